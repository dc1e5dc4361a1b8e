"""Adapters in PEFT's files: their names there, and reading them back into the shards."""

from pathlib import Path

from safetensors import safe_open
from torch import nn

from raytrain_adv.dtensor import copy_local, local_region, plain_name
from raytrain_adv.errors import JobError
from raytrain_adv.transforms.lora import ADAPTER, is_adapter

FILE_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Where PEFT's own wrapper keeps the model; its files carry the name."""


def peft_name(fqn: str) -> str:
    """Return an adapter parameter's name in PEFT's files."""
    # DoRA's magnitudes keep the `.weight` that PEFT drops when it saves: PEFT reads both forms,
    # while transformers 5.17 to 5.23 does not find the dropped one and uses its own magnitudes.
    return PREFIX + plain_name(fqn).replace(f".{ADAPTER}.", ".")


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Read a folder's adapters into this rank's shards of a model that has the same ones.

    Raises:
        JobError: if it has others.
    """
    with safe_open(folder / FILE_NAME, framework="pt") as file:
        held = set(file.keys())
        ours = {peft_name(fqn) for fqn, _ in model.named_parameters() if is_adapter(fqn)}
        if odd := sorted(ours ^ held):
            found = f"{len(odd)} tensors are in one of the two only, as {odd[0]}"
            fix = "give the folder of an adapter of this model and lora_target"
            raise JobError(f"{folder} has other adapters than the model", found, fix)
        for fqn, parameter in model.named_parameters():
            if is_adapter(fqn):
                part = file.get_slice(peft_name(fqn))[local_region(parameter)]
                copy_local(parameter, part)
