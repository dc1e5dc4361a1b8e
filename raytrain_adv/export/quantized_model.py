"""A run's quantized model: written from the trained one's files, and compared with it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.export.folder import NewFolder
from raytrain_adv.export.quantize import add_adapter, write_quantized
from raytrain_adv.export.verify import (
    MOST_TOKENS,
    Comparison,
    compare_quantized,
    fake_quantized_logits,
)
from raytrain_adv.transforms.lora import Lora


def quantized_dir(model_dir: Path) -> Path:
    """Return where the quantized model goes: next to the trained one."""
    return model_dir.with_name(f"{model_dir.name}-quantized")


def export_quantized(
    model: PreTrainedModel,
    job: JobConfig,
    model_dir: Path,
    base: Path | None,
    new: NewFolder,
    dtype: torch.dtype,
    input_ids: torch.Tensor | None,
    max_file_bytes: int,
) -> Comparison | None:
    """Write the quantized model next to the trained one; every rank calls this.

    After LoRA these are the quantized base and the adapter, as they were trained. Merging is not
    offered: an adapter is trained on the rounded base, and rounding the sum of both would put back
    the error that training has taken out.

    Args:
        model: trained; sharded, wrapped and compiled as it is.
        job: the job that trained it.
        model_dir: holds the trained model, or its adapter.
        base: holds the model the adapter belongs to.
        new: the quantized folder.
        dtype: the dtype training computed in.
        input_ids: [tokens], what the quantized model is compared on; none leaves that out.
        max_file_bytes: size at which a new safetensors file is begun.

    Returns:
        On rank 0 how it compares; none on the others, or where nothing was compared.

    Raises:
        TrainingError: on every rank, when the folder does not compute what was trained.
        StorageError: on every rank, when the folder could not be written. In both cases nothing is
            left under its name.
    """
    device, adapted = new.device, job.transform(Lora).enabled
    source = base if adapted and base is not None else model_dir
    reference = tokens = None
    if input_ids is not None:
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", MOST_TOKENS)
        tokens = input_ids[: min(limit, MOST_TOKENS)].long().unsqueeze(0).to(device)
        reference = fake_quantized_logits(model, job, tokens)
    comparisons: list[Comparison] = []

    def write() -> None:
        write_quantized(source, new.partial, job, dtype, device, max_file_bytes, new.require_now)
        if adapted:
            add_adapter(model_dir, new.partial, new.path)

    def compare() -> None:
        if tokens is not None and reference is not None:
            attention = model.config._attn_implementation
            comparisons.append(compare_quantized(new.partial, job, tokens, reference, attention))

    new.run(write)
    new.run(compare)
    new.publish()
    return comparisons[0] if comparisons else None
