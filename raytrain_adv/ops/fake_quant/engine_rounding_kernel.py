"""The Triton kernel of engines' roundings: a row is read once. Divisions round as IEEE's do."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from raytrain_adv.ops.fake_quant.targets import BLOCK

ELEMENTS = 4096  # values that one program rounds, where a row is not longer
ROWS, TOKENS, SYMMETRIC_TOKENS, FLOAT8, FLOAT8_IN_DTYPE, FLOAT8_BLOCKS, NVFP4, MXFP4 = range(8)
"""Roundings: those of quantize_rows, quantize_tokens, fake_quantize_inputs_of_experts, of
quantize_float8 with scales in float32 or the source's dtype, quantize_float8_blocks, and
quantize_float4. What shares a scale is called a row here: a group, or a block.
"""
_ROWS, _TOKENS, _SYMMETRIC_TOKENS = map(tl.constexpr, (ROWS, TOKENS, SYMMETRIC_TOKENS))
_FLOAT8, _BLOCKS, _NVFP4, _MXFP4 = map(tl.constexpr, (FLOAT8, FLOAT8_BLOCKS, NVFP4, MXFP4))
_WIDTH = tl.constexpr(BLOCK)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def _offsets(row, column, size, FORM: tl.constexpr):  # type: ignore[no-untyped-def] # not Python values
    if FORM == _BLOCKS:  # size is that of the matrix's rows
        across = size // _WIDTH
        first = (row // across).to(tl.int64) * _WIDTH * size + (row % across) * _WIDTH
        return first[:, None] + ((column // _WIDTH) * size + column % _WIDTH)[None, :]
    return row[:, None].to(tl.int64) * size + column[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def _symmetric(value, amax, least_scale, DTYPE: tl.constexpr, FORM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return rounded values and their scale, both in float32."""
    if FORM == _ROWS:
        scale = tl.math.div_rn(amax, 127.5).to(DTYPE).to(tl.float32)
        integer = libdevice.rint(tl.math.div_rn(value, scale[:, None]))
        return tl.minimum(tl.maximum(integer, -128.0), 127.0), scale
    if FORM == _SYMMETRIC_TOKENS:
        scale = tl.math.div_rn(amax, 127.0)
        integer = libdevice.rint(value * tl.math.div_rn(127.0, amax)[:, None])
        return integer * scale[:, None], scale
    scale = tl.math.div_rn(amax, 448.0)
    if FORM != _FLOAT8:
        scale = scale.to(DTYPE).to(tl.float32)
    scale = tl.maximum(scale, least_scale)
    return tl.minimum(tl.maximum(tl.math.div_rn(value, scale[:, None]), -448.0), 448.0), scale


@triton.jit
def _asymmetric(value, inside, eps):  # type: ignore[no-untyped-def]
    """Return integers, their scale and their zero point, all in float32."""
    low = tl.min(tl.where(inside, value, float("inf")), axis=1)
    high = tl.max(tl.where(inside, value, float("-inf")), axis=1)
    scale = tl.maximum(tl.math.div_rn(high - low, 255.0), eps)
    zero_point = libdevice.rint(-128.0 - tl.math.div_rn(low, scale))
    integer = libdevice.rint(tl.math.div_rn(value, scale[:, None])) + zero_point[:, None]
    return tl.minimum(tl.maximum(integer, -128.0), 127.0), scale, zero_point


@triton.jit  # type: ignore[untyped-decorator]
def _four_bits(value, amax, FORM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return values of E2M1 and their scale, both in float32."""
    if FORM == _MXFP4:
        exponent = ((amax.to(tl.int32, bitcast=True) + (1 << 21)) >> 23) - 2
        exponent = tl.minimum(tl.maximum(exponent, 1), 254)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
    else:
        scale = tl.math.div_rn(amax, 6.0) * 512.0
        scale = tl.minimum(tl.maximum(scale, 0.001953125), 448.0)
        scale = scale.to(tl.float8e4nv).to(tl.float32) * 0.001953125
    scaled = tl.math.div_rn(value, scale[:, None])
    scaled = tl.minimum(tl.maximum(scaled, -6.0), 6.0)
    size = tl.abs(scaled)
    step = tl.where(size < 2.0, 0.5, tl.where(size < 4.0, 1.0, 2.0))
    of_one = tl.where(size < 2.0, 2.0, tl.where(size < 4.0, 1.0, 0.5))
    return libdevice.rint(scaled * of_one) * step, scale


@triton.jit  # type: ignore[untyped-decorator]
def _round(  # type: ignore[no-untyped-def]
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
    row = tl.program_id(0) * ROWS_AT_ONCE + tl.arange(0, ROWS_AT_ONCE)
    column = tl.arange(0, COLUMNS)
    inside = row[:, None] < num_rows
    if FORM != _BLOCKS:
        inside = inside & (column[None, :] < size)
    offsets = _offsets(row, column, size, FORM)
    value = tl.load(source + offsets, mask=inside, other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(value), axis=1), eps)
    # Minima and maxima pass over NaN: a row that has one, or infinity, gets a scale of NaN.
    not_finite = tl.sum(value * 0.0, axis=1)
    if FORM == _TOKENS:
        result, scale, zero_point = _asymmetric(value, inside, eps)
        tl.store(zero_points + row, zero_point.to(tl.int32), mask=row < num_rows)
    elif FORM >= _NVFP4:
        result, scale = _four_bits(value, amax, FORM)
    else:
        result, scale = _symmetric(value, amax, least_scale, source.dtype.element_ty, FORM)
    if FORM == _SYMMETRIC_TOKENS:
        result = result + not_finite[:, None]
    tl.store(scales + row, scale + not_finite, mask=row < num_rows)
    tl.store(results + offsets, result.to(results.dtype.element_ty), mask=inside)


def launch(
    form: int,
    source: Tensor,
    results: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    eps: float = 0.0,
    least_scale: float = 0.0,
) -> None:
    """Round `source` by `form` into `results`, contiguous and of its shape; write each row's scale
    in float32, and for TOKENS its zero point in int32. As many values share one as there are
    scales; of FLOAT8_BLOCKS, `source` is a matrix.
    """
    source, num_rows = source.contiguous(), scale.numel()
    if num_rows == 0:  # an expert without tokens
        return
    size = source.shape[-1] if form == FLOAT8_BLOCKS else source.numel() // num_rows
    columns = BLOCK * BLOCK if form == FLOAT8_BLOCKS else triton.next_power_of_2(size)
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
