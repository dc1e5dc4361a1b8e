"""Adapters in PEFT's files: their names there, and reading them back into the shards."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from raytrain_adv.dtensor import copy_local, local_region, plain_name
from raytrain_adv.errors import JobError
from raytrain_adv.text import first_line
from raytrain_adv.transforms.lora import ADAPTER

FILE_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Where PEFT's own wrapper keeps the model; its files carry the name."""


def peft_name(fqn: str) -> str:
    """Return an adapter parameter's name in PEFT's files."""
    # DoRA's magnitudes keep the `.weight` that PEFT drops when it saves: PEFT reads both forms,
    # while transformers 5.17 to 5.23 does not find the dropped one and uses its own magnitudes.
    return PREFIX + plain_name(fqn).replace(f".{ADAPTER}.", ".")


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what an adapter's file holds by its names there: adapters, and modules that are
    trained in full. A tied one has both of its names: PEFT keeps a copy for each.
    """
    named = model.named_parameters(remove_duplicate=False)
    return {peft_name(fqn): p for fqn, p in named if p.requires_grad}


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Read a folder's adapters into this rank's shards of a model that has the same ones.

    Raises:
        JobError: if it has others, or its file cannot be read.
    """
    try:
        _load_adapter(model, folder)
    except (OSError, SafetensorError) as error:
        fix = "copy the adapter's folder again"
        raise JobError(f"{folder / FILE_NAME} cannot be read", first_line(error), fix) from error


def _load_adapter(model: nn.Module, folder: Path) -> None:
    ours = trained(model)
    fix = "give the folder of an adapter of this model, lora_target and additional_target"
    with safe_open(folder / FILE_NAME, framework="pt") as file:
        held = set(file.keys())
        if odd := sorted(ours.keys() ^ held):
            found = f"{len(odd)} tensors are in one of the two only, as {odd[0]}"
            raise JobError(f"{folder} has other adapters than the model", found, fix)
        for name, parameter in ours.items():
            part = file.get_slice(name)
            if (shape := tuple(part.get_shape())) != tuple(parameter.shape):  # would be broadcast
                found = f"{name} is {list(shape)}, and {list(parameter.shape)} in the model"
                raise JobError(f"{folder} has other adapters than the model", found, fix)
            copy_local(parameter, part[local_region(parameter)])
