"""Weights that FSDP2 gathers in float8: how they come about, and how they are plain again."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torchao.float8.float8_linear import Float8Linear
from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor


def gather_in_float8(linear: Float8Linear) -> None:
    """Have FSDP2 cast this linear's weight before it is gathered; to be called before fully_shard.

    Source: torchao.float8.float8_linear.Float8Linear.from_float, which does it at conversion, also
    where nothing is ever gathered.
    """
    linear.config = replace(linear.config, enable_fsdp_float8_all_gather=True)
    linear.weight = nn.Parameter(
        WeightWithDynamicFloat8CastTensor(
            linear.weight, linear.linear_mm_config, linear.config.cast_config_weight.target_dtype
        ),
        requires_grad=linear.weight.requires_grad,
    )


def as_plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same values, of the same storage, without torchao's type; others as they are.

    A checkpoint with that type in it could be read only by a process that has torchao.
    """
    if isinstance(tensor, WeightWithDynamicFloat8CastTensor):
        return tensor._tensor  # type: ignore[no-any-return] # torchao ships no types
    local = tensor._local_tensor if isinstance(tensor, DTensor) else None
    if not isinstance(local, WeightWithDynamicFloat8CastTensor):
        return tensor
    assert isinstance(tensor, DTensor)
    return DTensor.from_local(
        local._tensor,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
