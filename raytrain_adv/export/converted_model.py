"""A run's converted model: written from the files of the trained one, loaded, and compared."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.export.convert import add_adapter, write_converted
from raytrain_adv.export.folder import NewFolder
from raytrain_adv.export.verify import (
    MOST_TOKENS,
    Comparison,
    compare_converted,
    converted_logits,
)
from raytrain_adv.transforms.lora import Lora


def export_converted(
    model: PreTrainedModel,
    job: JobConfig,
    model_dir: Path,
    base: Path | None,
    new: NewFolder,
    dtype: torch.dtype,
    input_ids: torch.Tensor | None,
    max_file_bytes: int,
) -> Comparison | None:
    """Write the converted model next to the trained one, and compare it; every rank calls this.

    A LoRA run's base is converted and its adapter copied: merging would round their sum again and
    restore the error that training has removed.

    Args:
        model: trained; sharded, wrapped and compiled as it is.
        job: the job that trained it.
        model_dir: the trained model, or its adapter.
        base: the model that the adapter belongs to.
        new: the converted folder.
        dtype: the dtype training computed in.
        input_ids: [tokens], what the converted model is compared on; none skips that.
        max_file_bytes: size at which a new safetensors file is begun.

    Returns:
        On rank 0 how it compares; none on the others, or if nothing was compared.

    Raises:
        TrainingError: on every rank, when the folder does not compute what was trained.
        StorageError: on every rank, when it could not be written. Nothing is left under its name.
    """
    device, adapted = new.device, job.transform(Lora).enabled
    source = base if adapted and base is not None else model_dir
    reference = tokens = None
    if input_ids is not None:
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", MOST_TOKENS)
        tokens = input_ids[: min(limit, MOST_TOKENS)].long().unsqueeze(0).to(device)
        reference = converted_logits(model, job, tokens)
    comparisons: list[Comparison] = []

    def write() -> None:
        write_converted(source, new.partial, job, dtype, device, max_file_bytes, new.require_now)
        if adapted:
            add_adapter(model_dir, new.partial, new.path)

    def compare() -> None:
        if tokens is not None and reference is not None:
            attention = model.config._attn_implementation
            comparisons.append(compare_converted(new.partial, job, tokens, reference, attention))

    new.run(write)
    new.run(compare)
    new.publish()
    return comparisons[0] if comparisons else None
