"""OFT through PEFT: inputs of frozen linears, rotated in blocks."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft import OFTConfig, inject_adapter_in_model
from peft.tuners.oft.layer import OFTLayer, OFTRotationModule
from torch import Tensor, nn

from raytrain_adv.dtensor import local_part


class Rotation(OFTRotationModule):
    """PEFT's rotation, whose indices are computed: as buffers that no file has they would have no
    values after a model was built without memory.
    """

    @property
    def rows(self) -> Tensor:
        """Rows of the values above a block's diagonal."""
        return torch.triu_indices(self.block_size, self.block_size, 1, device=self.weight.device)[0]

    @property
    def cols(self) -> Tensor:
        """Their columns."""
        return torch.triu_indices(self.block_size, self.block_size, 1, device=self.weight.device)[1]


def config(targets: list[str], rank: int, block_size: int, dropout: float) -> OFTConfig:
    """Return PEFT's description of rotations."""
    return OFTConfig(
        r=rank,
        oft_block_size=block_size,
        module_dropout=dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )


def inject(model: nn.Module, config: OFTConfig, adapter: str) -> None:
    """Let PEFT put rotations on modules, by its config."""
    with warnings.catch_warnings():  # that a size was adjusted, which the plan has
        warnings.filterwarnings("ignore", message="Invalid `")
        inject_adapter_in_model(config, model, adapter)
    compute_indices(model)


def compute_indices(model: nn.Module) -> None:
    """Make the rotations of a model without memory compute their indices."""
    for module in model.modules():
        if isinstance(module, OFTRotationModule):
            del module._buffers["rows"], module._buffers["cols"]
            module.__class__ = Rotation


def initialize(model: nn.Module) -> None:
    """Rotate by nothing yet."""
    for module in model.modules():
        if isinstance(module, OFTRotationModule):
            with torch.no_grad():
                local_part(module.weight).zero_()


def blocks(inputs: int, rank: int, block_size: int) -> tuple[int, int]:
    """Return number and size of the blocks that PEFT makes of a linear's inputs."""
    nearest: Any = OFTLayer.adjust_oft_parameters
    given = rank or block_size
    if given > inputs or inputs % given:
        given = nearest(None, inputs, given)
    return (given, inputs // given) if rank else (inputs // given, given)


def num_parameters(inputs: int, rank: int, block_size: int) -> int:
    """Return the number of values of a linear's rotation."""
    count, size = blocks(inputs, rank, block_size)
    return count * (size * (size - 1) // 2)


def describe(widths: Iterable[int], rank: int, block_size: int) -> str:
    """Return the blocks of linears with these inputs, in words."""
    made = {width: blocks(width, rank, block_size) for width in sorted(set(widths))}
    each = (f"{count} of {size} for {width} inputs" for width, (count, size) in made.items())
    return f"blocks that OFT rotates: {', '.join(each)}"
