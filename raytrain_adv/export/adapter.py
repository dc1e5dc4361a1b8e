"""Adapters in PEFT's format: what PeftModel.from_pretrained, vLLM and transformers read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from raytrain_adv.config import JobConfig
from raytrain_adv.dtensor import gather, reshard
from raytrain_adv.export.folder import NewFolder, save_tensors
from raytrain_adv.model.adapter import peft_name
from raytrain_adv.model.files import is_local, model_source
from raytrain_adv.transforms.lora import ADAPTER, is_adapter

if TYPE_CHECKING:
    # Not for every process of every run: it imports bitsandbytes, and that PyTorch's compiler.
    from peft import LoraConfig


def write_adapter(model: PreTrainedModel, job: JobConfig, new: NewFolder) -> None:
    """Gather the adapters and write them with their config on rank 0; a collective."""
    reshard(model)
    tensors: dict[str, torch.Tensor] = {}
    for fqn, parameter in model.named_parameters():
        if is_adapter(fqn):
            whole = gather(parameter)
            if new.writes:
                tensors[peft_name(fqn)] = whole.cpu().contiguous()
    new.run(lambda: _write(tensors, adapter_config(model, job), new.partial))


def adapter_config(model: PreTrainedModel, job: JobConfig) -> LoraConfig:
    """Return PEFT's config of the adapters, naming the model they belong to."""
    config: Any = copy.copy(model.peft_config[ADAPTER])
    local = is_local(job)
    config.base_model_name_or_path = (
        str(Path(model_source(job)).resolve()) if local else model_source(job)
    )
    config.revision = None if local else job.model.model_revision
    config.inference_mode = True
    config.init_lora_weights = True
    written: LoraConfig = config
    return written


def _write(tensors: dict[str, torch.Tensor], config: LoraConfig, folder: Path) -> None:
    save_tensors(tensors, folder / "adapter_model.safetensors")
    config.save_pretrained(str(folder))
