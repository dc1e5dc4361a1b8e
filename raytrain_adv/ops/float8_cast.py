"""Cast a matrix to float8 together with its transpose, reading it once.

Hopper's float8 products want both factors with the summed dimension last, so that a training step
needs every activation, gradient and weight in both layouts. Cast and transposed copy as two kernels
read the bfloat16 matrix twice and write the second one slowly: 63 ms of a 634 ms step of an 8B
model on an H200 went into one of these (torch 2.11).
"""

from __future__ import annotations

import torch

EPS = 1e-12
"""Smallest amax that is divided by; torchao's (float8_utils.EPS)."""


def tensorwise_scale(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the float32 scalar that maps the largest magnitude onto the dtype's largest value.

    Source: torchao.float8.float8_utils.amax_to_scale; the division is in float64 there, so that
    eager and compiled code agree.
    """
    amax = tensor.abs().max().to(torch.float64)
    return (torch.finfo(dtype).max / torch.clamp(amax, min=EPS)).to(torch.float32)


def cast(tensor: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return tensor * scale in float8, values out of range brought to its ends."""
    largest = torch.finfo(dtype).max
    return (tensor.to(torch.float32) * scale).clamp(min=-largest, max=largest).to(dtype)


@torch.library.custom_op("raytrain_adv::cast_both", mutates_args=(), device_types="cpu")
def cast_both(
    tensor: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cast of a matrix, and the cast of its transpose; both contiguous.

    Args:
        tensor: [rows, columns], contiguous.
        scale: float32 scalar on the same device.
        dtype: a float8 dtype.

    Returns:
        [rows, columns] and [columns, rows].
    """
    plain = cast(tensor, scale, dtype)
    return plain, plain.t().contiguous()


@cast_both.register_fake
def _(
    tensor: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = tensor.shape
    return (
        tensor.new_empty((rows, columns), dtype=dtype),
        tensor.new_empty((columns, rows), dtype=dtype),
    )


@cast_both.register_kernel("cuda")
def _(
    tensor: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    from raytrain_adv.ops.float8_cast_kernel import launch

    rows, columns = tensor.shape
    plain = tensor.new_empty((rows, columns), dtype=dtype)
    transposed = tensor.new_empty((columns, rows), dtype=dtype)
    launch(tensor, scale, plain, transposed)
    return plain, transposed


@torch.library.custom_op("raytrain_adv::cast_transposed", mutates_args=(), device_types="cpu")
def cast_transposed(tensor: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the cast of a matrix's transpose, [columns, rows], contiguous; see cast_both."""
    return cast(tensor, scale, dtype).t().contiguous()


@cast_transposed.register_fake
def _(tensor: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rows, columns = tensor.shape
    return tensor.new_empty((columns, rows), dtype=dtype)


@cast_transposed.register_kernel("cuda")
def _(tensor: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from raytrain_adv.ops.float8_cast_kernel import launch

    rows, columns = tensor.shape
    transposed = tensor.new_empty((columns, rows), dtype=dtype)
    launch(tensor, scale, None, transposed)
    return transposed
