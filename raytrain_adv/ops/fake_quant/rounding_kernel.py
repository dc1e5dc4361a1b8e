"""The Triton kernel of fake_quantize: values are read once.

Every intermediate result is rounded to the tensor's dtype, as by torch's operations: only so are
the integers those of the exported model.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

ELEMENTS = 4096  # values that one program rounds, where a range is not longer


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def _as(value, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def] # its arguments are not Python values
    return value.to(DTYPE).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _round(  # type: ignore[no-untyped-def]
    source,
    rounded,
    scales,
    zero_points,
    num_groups,
    group_size,
    eps,
    step,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    IS_SYMMETRIC: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    DTYPE: tl.constexpr = source.dtype.element_ty
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    column = tl.arange(0, COLUMNS)
    inside = (group[:, None] < num_groups) & (column[None, :] < group_size)
    offsets = group[:, None].to(tl.int64) * group_size + column[None, :]
    value = tl.load(source + offsets, mask=inside, other=0.0).to(tl.float32)
    # Zero is always in range, so that what is masked does no harm.
    low, high = tl.min(value, axis=1), tl.max(value, axis=1)
    low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
    if IS_SYMMETRIC:
        half = (LARGEST - SMALLEST) / 2.0
        scale = tl.math.div_rn(tl.maximum(-low, high), tl.full([GROUPS], half, tl.float32))
        scale = tl.maximum(_as(scale, DTYPE), eps)
        zero_point = tl.zeros([GROUPS], tl.float32)
    else:
        # On a GPU torch divides by a number as it multiplies with its float32 reciprocal.
        scale = tl.maximum(_as(_as(high - low, DTYPE) * step, DTYPE), eps)
        zero_point = SMALLEST - libdevice.rint(_as(tl.math.div_rn(low, scale), DTYPE))
        zero_point = tl.minimum(tl.maximum(_as(zero_point, DTYPE), SMALLEST), LARGEST)
        tl.store(zero_points + group, zero_point.to(tl.int8), mask=group < num_groups)
    tl.store(scales + group, scale, mask=group < num_groups)
    inverse = _as(tl.math.div_rn(tl.full([GROUPS], 1.0, tl.float32), scale), DTYPE)
    integer = libdevice.rint(_as(value * inverse[:, None], DTYPE))
    integer = _as(integer + zero_point[:, None], DTYPE)
    integer = tl.minimum(tl.maximum(integer, SMALLEST), LARGEST)
    result = _as(integer - zero_point[:, None], DTYPE) * scale[:, None]
    tl.store(rounded + offsets, result, mask=inside)


def launch(
    source: Tensor,
    rounded: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    ends: tuple[int, int],
    least_scale: float = 0.0,
) -> None:
    """Round `source`, contiguous, into `rounded`; write each group's scale and any zero point."""
    num_groups = source.numel() // group_size
    columns = triton.next_power_of_2(group_size)
    groups = max(1, ELEMENTS // columns)
    options: dict[str, Any] = {"num_warps": 4 if columns <= ELEMENTS else 8}
    _round[(triton.cdiv(num_groups, groups),)](
        source,
        rounded,
        scale,
        scale if zero_point is None else zero_point,
        num_groups,
        group_size,
        max(torch.finfo(source.dtype).smallest_normal, least_scale),
        1.0 / (ends[1] - ends[0]),
        SMALLEST=ends[0],
        LARGEST=ends[1],
        IS_SYMMETRIC=zero_point is None,
        GROUPS=groups,
        COLUMNS=columns,
        **options,
    )
