"""Cast a matrix to float8 together with its transpose, reading it once; multiply such matrices.

Hopper's float8 products want both factors with the summed dimension last: training needs every
matrix in both layouts. Cast and transposed copy as two kernels took 63 ms of an 8B model's 634 ms
step on an H200 (torch 2.11).
"""

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
EPS = 1e-12  # smallest amax that is divided by; torchao's (float8_utils.EPS)


def tensorwise_scale(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the float32 scalar that maps the largest magnitude onto the dtype's largest value."""
    return scale_of(tensor.abs().max(), dtype)


def scale_of(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """Return, in float32, what maps each magnitude onto the dtype's largest value.

    Source: torchao.float8.float8_utils.amax_to_scale; it divides in float64, eager or compiled.
    """
    amax = amax.to(torch.float64)
    return (torch.finfo(dtype).max / torch.clamp(amax, min=EPS)).to(torch.float32)


def cast(tensor: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return tensor * scale in float8, values out of range brought to its ends."""
    largest = torch.finfo(dtype).max
    return (tensor.to(torch.float32) * scale).clamp(min=-largest, max=largest).to(dtype)


def _turned(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    rows, columns = tensor.shape
    return tensor.new_empty((columns, rows), dtype=dtype)


def _both(tensor: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return tensor.new_empty(tensor.shape, dtype=dtype), _turned(tensor, dtype)


@torch.library.custom_op("raytrain_adv::cast_both", mutates_args=())
def cast_both(tensor: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a contiguous matrix's cast and its transpose's; scale: float32 on the same device."""
    if not tensor.is_cuda:
        plain = cast(tensor, scale, dtype)
        return plain, plain.t().contiguous()
    from raytrain_adv.ops.float8.cast_kernel import launch

    result = _both(tensor, scale, dtype)
    launch(tensor, scale, *result)
    return result


@torch.library.custom_op("raytrain_adv::cast_transposed", mutates_args=())
def cast_transposed(tensor: Tensor, scale: Tensor, dtype: torch.dtype, after: Tensor) -> Tensor:
    """Return the cast of a transpose, [columns, rows]; see cast_both and transposed."""
    if not tensor.is_cuda:
        return cast(tensor, scale, dtype).t().contiguous()
    from raytrain_adv.ops.float8.cast_kernel import launch

    result = _turned(tensor, dtype)
    launch(tensor, scale, None, result)
    return result


@torch.library.custom_op("raytrain_adv::transposed", mutates_args=())
def transposed(matrix: Tensor, after: Tensor) -> Tensor:
    """Return a float8 matrix's transpose, [columns, rows], contiguous.

    `after` is unused: a tensor that exists only in backward keeps this operator there.
    torch.compile would transpose a weight in forward and keep that: a copy of the model on every
    GPU.
    """
    if not matrix.is_cuda:
        # As bytes: transposing float8 has been miscompiled (triton 3.7, triton#11111).
        return matrix.view(torch.uint8).t().contiguous().view(matrix.dtype)
    from raytrain_adv.ops.float8.cast_kernel import launch_transpose

    result = _turned(matrix, matrix.dtype)
    launch_transpose(matrix, result)
    return result


cast_both.register_fake(_both)
cast_transposed.register_fake(lambda tensor, scale, dtype, after: _turned(tensor, dtype))
transposed.register_fake(lambda matrix, after: _turned(matrix, matrix.dtype))


def cast_padded(tensor: Tensor, scale: Tensor, dtype: torch.dtype, num_rows: int) -> Tensor:
    """Return the cast of a matrix, with arbitrary rows added up to `num_rows`; see cast."""
    result = tensor.new_empty((num_rows, *tensor.shape[1:]), dtype=dtype)
    own = result[: tensor.shape[0]]
    if tensor.is_cuda:
        from raytrain_adv.ops.float8.cast_kernel import launch_plain

        launch_plain(tensor, scale, own)
    else:
        own.copy_(cast(tensor, scale, dtype))
    return result


def product(
    left: Tensor,
    right: Tensor,
    left_scale: Tensor,
    right_scale: Tensor,
    dtype: torch.dtype,
    fast: bool,
) -> Tensor:
    """Return left [a, k] @ right.t() [k, b] with both scales taken out again."""
    return multiply(left, right, left_scale.reciprocal(), right_scale.reciprocal(), dtype, fast)


def multiply(
    left: Tensor,
    right: Tensor,
    left_multiplier: Tensor,
    right_multiplier: Tensor,
    dtype: torch.dtype,
    fast: bool,
) -> Tensor:
    """Return left [a, k] @ right.t() [k, b] times both multipliers, float32 scalars."""
    return torch._scaled_mm(
        left,
        right.t(),
        scale_a=left_multiplier,
        scale_b=right_multiplier,
        out_dtype=dtype,
        use_fast_accum=fast,
    )
