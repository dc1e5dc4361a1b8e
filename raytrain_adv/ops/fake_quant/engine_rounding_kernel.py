"""The Triton kernel of engines' roundings: a row is read once. Divisions round as IEEE's do."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

ELEMENTS = 4096  # values that one program rounds, where a row is not longer
ROWS, TOKENS, SYMMETRIC_TOKENS, FLOAT8, FLOAT8_IN_DTYPE = range(5)
"""Roundings: those of quantize_rows, quantize_tokens, fake_quantize_inputs_of_experts, and
quantize_float8's with a scale in float32 or in the source's dtype.
"""
_ROWS, _TOKENS, _SYMMETRIC_TOKENS = map(tl.constexpr, (ROWS, TOKENS, SYMMETRIC_TOKENS))
_FLOAT8_IN_DTYPE = tl.constexpr(FLOAT8_IN_DTYPE)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def _round(  # type: ignore[no-untyped-def] # its arguments are not Python values
    source,
    results,
    scales,
    zero_points,
    num_rows,
    size,
    eps,
    least_scale,
    FORM: tl.constexpr,
    ROWS_AT_ONCE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    DTYPE: tl.constexpr = source.dtype.element_ty
    RESULT: tl.constexpr = results.dtype.element_ty
    row = tl.program_id(0) * ROWS_AT_ONCE + tl.arange(0, ROWS_AT_ONCE)
    column = tl.arange(0, COLUMNS)
    inside = (row[:, None] < num_rows) & (column[None, :] < size)
    offsets = row[:, None].to(tl.int64) * size + column[None, :]
    value = tl.load(source + offsets, mask=inside, other=0.0).to(tl.float32)
    # Minima and maxima pass over NaN; a row that has one, or infinity, gets a scale of NaN.
    not_finite = tl.sum(value * 0.0, axis=1)
    amax = tl.maximum(tl.max(tl.abs(value), axis=1), eps) + not_finite
    if FORM == _TOKENS:
        low = tl.min(tl.where(inside, value, float("inf")), axis=1)
        high = tl.max(tl.where(inside, value, float("-inf")), axis=1)
        scale = tl.maximum(tl.math.div_rn(high - low, 255.0), eps) + not_finite
        zero_point = libdevice.rint(-128.0 - tl.math.div_rn(low, scale))
        tl.store(zero_points + row, zero_point.to(tl.int32), mask=row < num_rows)
        result = libdevice.rint(tl.math.div_rn(value, scale[:, None])) + zero_point[:, None]
        result = tl.minimum(tl.maximum(result, -128.0), 127.0)
    elif FORM == _ROWS:
        scale = tl.math.div_rn(amax, 127.5).to(DTYPE).to(tl.float32)
        result = libdevice.rint(tl.math.div_rn(value, scale[:, None]))
        result = tl.minimum(tl.maximum(result, -128.0), 127.0)
    elif FORM == _SYMMETRIC_TOKENS:
        scale = tl.math.div_rn(amax, 127.0)
        result = libdevice.rint(value * tl.math.div_rn(127.0, amax)[:, None]) * scale[:, None]
    else:
        scale = tl.math.div_rn(amax, 448.0)
        if FORM == _FLOAT8_IN_DTYPE:
            scale = scale.to(DTYPE).to(tl.float32)
        scale = tl.maximum(scale, least_scale) + not_finite
        result = tl.math.div_rn(value, scale[:, None])
        result = tl.minimum(tl.maximum(result, -448.0), 448.0)
    tl.store(scales + row, scale, mask=row < num_rows)
    tl.store(results + offsets, result.to(RESULT), mask=inside)


def launch(
    form: int,
    source: Tensor,
    results: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    eps: float = 0.0,
    least_scale: float = 0.0,
) -> None:
    """Round `source` [..., features] by `form` into `results`, contiguous and of its shape; write
    each row's scale in float32, and for TOKENS its zero point in int32.
    """
    source, size = source.contiguous(), source.shape[-1]
    num_rows = source.numel() // size
    columns = triton.next_power_of_2(size)
    rows = max(1, ELEMENTS // columns)
    options: dict[str, Any] = {"num_warps": min(32, max(4, columns // 2048))}
    _round[(triton.cdiv(num_rows, rows),)](
        source,
        results,
        scale,
        scale if zero_point is None else zero_point,
        num_rows,
        size,
        eps,
        least_scale,
        FORM=form,
        ROWS_AT_ONCE=rows,
        COLUMNS=columns,
        **options,
    )
