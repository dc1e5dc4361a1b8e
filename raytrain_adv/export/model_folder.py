"""The trained model as a Hugging Face folder, gathered by tensors, in the checkpoint's layout."""

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from raytrain_adv.config import JobConfig
from raytrain_adv.errors import TrainingError
from raytrain_adv.export.adapter import write_adapter
from raytrain_adv.export.folder import NewFolder, TensorFiles
from raytrain_adv.shards import gather
from raytrain_adv.transforms.lora import Lora
from raytrain_adv.worker.checkpoint_files import model_folder
from raytrain_adv.worker.conversion import save_groups
from raytrain_adv.worker.model import build, is_local, model_source, read_config
from raytrain_adv.worker.weights import saved_tensors

MAX_FILE_BYTES = 5_000_000_000


def export_model(
    model: PreTrainedModel,
    job: JobConfig,
    out_dir: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the model as a folder that loads with AutoModelForCausalLM; every rank calls this.

    Weights are bfloat16 for a run in bf16 or pure_bf16, otherwise float32. A LoRA run writes its
    adapters in PEFT's format, which load the same way as long as the base model is where it was.
    Rank 0 holds one file's tensors in host memory, every rank one whole tensor on its device. The
    folder appears under its name when it is complete.

    Args:
        model: trained; sharded, wrapped and compiled as it is.
        job: the job that trained it.
        out_dir: replaced if it exists.
        tokenizer: saved beside the model, with its chat template.
        max_file_bytes: size at which a new safetensors file is begun.

    Raises:
        StorageError: on every rank, when the folder could not be written; nothing is left under its
            name.
    """
    new = NewFolder(out_dir, collective_device(model))
    if job.transform(Lora).enabled:
        write_adapter(model, job, new)
    else:
        write_model(model, job, new, max_file_bytes)
    if tokenizer is not None:
        new.run(lambda: _save_tokenizer(tokenizer, new.partial))
    new.publish()


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    tokenizer.save_pretrained(str(folder))


def collective_device(model: PreTrainedModel) -> torch.device:
    """Return the device on which the model's collectives run."""
    parameter = next(model.parameters())
    if not isinstance(parameter, DTensor):
        return parameter.device
    kind = parameter.device_mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def export_dtype(job: JobConfig) -> torch.dtype:
    """Return the dtype of the exported weights: the one the model was run in."""
    return torch.bfloat16 if job.train.bf16 or job.train.pure_bf16 else torch.float32


def write_model(
    model: PreTrainedModel, job: JobConfig, new: NewFolder, max_file_bytes: int
) -> None:
    """Gather the weights group by group and write them, the config and what goes with it, on rank
    0.
    """
    plain, dtype = build(job), export_dtype(job)
    trained, wanted = saved_tensors(model), saved_tensors(plain)
    new.require(sum(t.numel() * stored_dtype(t, dtype).itemsize for t in wanted.values()))
    files = TensorFiles(new.partial, max_file_bytes)
    for group in save_groups(plain, wanted):
        whole: dict[str, torch.Tensor] = {}
        for name in group.names():
            tensor = gather(trained[name])
            if new.writes and new.failure is None:
                whole[name] = tensor.to(stored_dtype(tensor, dtype)).cpu()
            del tensor

        def add(held: Mapping[str, torch.Tensor] = whole, group: Any = group) -> None:
            for name, value in group.convert(held, plain).items():
                files.add(name, value)

        new.run(add)
    new.run(files.close)
    new.run(lambda: write_configs(plain, job, dtype, new.partial))


def stored_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype a tensor is stored in: integers and booleans keep theirs."""
    return dtype if tensor.is_floating_point() else tensor.dtype


def write_configs(plain: PreTrainedModel, job: JobConfig, dtype: torch.dtype, folder: Path) -> None:
    """Write config.json, generation_config.json, and model code that came with the checkpoint."""
    original = read_config(job)
    config: PretrainedConfig = copy.deepcopy(plain.config)
    config.architectures = [type(plain).__name__]
    config.dtype = dtype
    if "use_cache" in original.get_text_config().to_dict():
        config.use_cache = original.get_text_config().use_cache
    config.save_pretrained(str(folder))
    source = source_folder(job)
    if source is not None and (source / "generation_config.json").is_file():
        # Copied as it is: writing it anew would refuse values that older checkpoints have.
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
    else:
        GenerationConfig.from_model_config(config).save_pretrained(str(folder))
    if source is not None and job.model.trust_remote_code:
        for code in source.glob("*.py"):
            shutil.copyfile(code, folder / code.name)


def source_folder(job: JobConfig) -> Path | None:
    """Return the folder the model came from; none for a shape from the Hub that was trained from
    scratch.
    """
    if is_local(job):
        return Path(model_source(job))
    return None if job.model.train_from_scratch else model_folder(job)


@torch.no_grad()
def verify_folder(
    folder: Path,
    input_ids: torch.Tensor,
    reference: torch.Tensor,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> float:
    """Load an exported folder as a user would, and return how far its logits are from the trained
    model's.

    Args:
        folder: written by export_model.
        input_ids: [batch, tokens], long.
        reference: [batch, tokens, vocabulary], the trained model's logits for them.
        device: where to load it; none means the CPU.
        trust_remote_code: run model code that is in the folder.
        attn_implementation: the attention the reference was made with, as transformers names it.

    Returns:
        The largest absolute difference.

    Raises:
        TrainingError: when weights are missing from the folder, or left over.
    """
    auto: Any = AutoModelForCausalLM
    model, info = auto.from_pretrained(
        folder,
        dtype="auto",
        output_loading_info=True,
        trust_remote_code=trust_remote_code,
        attn_implementation=attn_implementation,
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise TrainingError(
            f"the model that was written to {folder} does not load",
            "\n".join(f"{kind}: {', '.join(names[:4])}" for kind, names in wrong.items()),
            "this is a defect of raytrain_adv or of the versions installed: compare them with "
            "constraints.txt",
        )
    model = model.to(device or torch.device("cpu")).eval()
    logits = model(input_ids=input_ids.to(model.device), use_cache=False).logits
    return float((logits.float() - reference.to(logits.device).float()).abs().max())
