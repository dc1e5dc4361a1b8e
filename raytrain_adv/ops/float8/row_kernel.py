"""The Triton kernels of row_cast: one read finds the largest of rows and columns, one casts."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from raytrain_adv.ops.float8.cast_kernel import (
    TILES,
    TRIED,
    grid,
    only,
    quick,
    size_class,
    to_bytes,
)
from raytrain_adv.ops.float8.row_cast import Layout, cast_on_gpu, define

MAGNITUDE = tl.constexpr(0x7FFFFFFF)  # the bits of a float32 without its sign
EXPONENT = tl.constexpr(0x7F800000)
EPS_BITS = tl.constexpr(0x2B8CBCCC)  # of cast.EPS
LARGEST = tl.constexpr(448.0)
WIDTH = 2048  # numbers of a row that a program takes at a time
SIZES = ["rows_class", "columns_class", "PLAIN", "TURNED"]


@triton.jit
def _bits(value):  # type: ignore[no-untyped-def] # its arguments are not Python values
    # Magnitudes are in the order of their bits, and a NaN is the largest, as in torch.amax.
    return value.to(tl.int32, bitcast=True) & MAGNITUDE


@triton.jit
def _power(bits):  # type: ignore[no-untyped-def] # its arguments are not Python values
    """Return LARGEST / amax, rounded down to a power of two."""
    scale = tl.div_rn(LARGEST, tl.maximum(bits, EPS_BITS).to(tl.float32, bitcast=True))
    power = (scale.to(tl.int32, bitcast=True) & EXPONENT).to(tl.float32, bitcast=True)
    return tl.where(scale == scale, power, scale)


@triton.autotune(configs=TILES, key=SIZES, do_bench=quick)  # type: ignore[untyped-decorator]
@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def _find_largest(  # type: ignore[no-untyped-def] # its arguments are not Python values
    source,
    of_rows,
    of_columns,
    rows,
    columns,
    rows_class,
    columns_class,
    PLAIN: tl.constexpr,
    TURNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    offsets = row[:, None].to(tl.int64) * columns + column[None, :]
    bits = _bits(tl.load(source + offsets, mask=inside, other=0.0).to(tl.float32))
    if PLAIN:
        tl.atomic_max(of_rows + row, tl.max(bits, 1), mask=row < rows, sem="relaxed")
    if TURNED:
        tl.atomic_max(of_columns + column, tl.max(bits, 0), mask=column < columns, sem="relaxed")


@triton.autotune(configs=TILES, key=SIZES, do_bench=quick)  # type: ignore[untyped-decorator]
@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def _cast_rows(  # type: ignore[no-untyped-def] # its arguments are not Python values
    source,
    of_rows,
    of_columns,
    plain,
    row_multiplier,
    turned,
    column_multiplier,
    rows,
    columns,
    rows_class,
    columns_class,
    PLAIN: tl.constexpr,
    TURNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    # The last rows first: the L2 cache still has them from the kernel before.
    row = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS + tl.arange(0, ROWS)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    offsets = row[:, None].to(tl.int64) * columns + column[None, :]
    value = tl.load(source + offsets, mask=inside, other=0.0).to(tl.float32)
    if PLAIN:
        scale = _power(tl.load(of_rows + row, mask=row < rows, other=0))
        tl.store(plain + offsets, to_bytes(value * scale[:, None], LARGEST, False), mask=inside)
        if tl.program_id(0) == 0:
            tl.store(row_multiplier + row, tl.div_rn(1.0, scale), mask=row < rows)
    if TURNED:
        scale = _power(tl.load(of_columns + column, mask=column < columns, other=0))
        byte = to_bytes(value * scale[None, :], LARGEST, False)
        offsets_t = column[:, None].to(tl.int64) * rows + row[None, :]
        inside_t = (column[:, None] < columns) & (row[None, :] < rows)
        tl.store(turned + offsets_t, tl.trans(byte), mask=inside_t)
        if tl.program_id(1) == 0:
            tl.store(column_multiplier + column, tl.div_rn(1.0, scale), mask=column < columns)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def _cast_each_row(  # type: ignore[no-untyped-def] # its arguments are not Python values
    source, plain, multiplier, columns, WIDTH: tl.constexpr
):
    start = tl.program_id(0).to(tl.int64) * columns
    bits = tl.zeros([WIDTH], tl.int32)
    for first in range(0, columns, WIDTH):
        column = first + tl.arange(0, WIDTH)
        value = tl.load(source + start + column, mask=column < columns, other=0.0)
        bits = tl.maximum(bits, _bits(value.to(tl.float32)))
    scale = _power(tl.max(bits, 0))
    tl.store(multiplier + tl.program_id(0), tl.div_rn(1.0, scale))
    for first in range(0, columns, WIDTH):
        column = first + tl.arange(0, WIDTH)
        value = tl.load(source + start + column, mask=column < columns, other=0.0)
        byte = to_bytes(value.to(tl.float32) * scale, LARGEST, False)
        tl.store(plain + start + column, byte, mask=column < columns)


def launch(source: Tensor, plain: Layout | None, turned: Layout | None) -> None:
    """Write the cast of `source` into the layouts that are given, of the sizes of allocate."""
    rows, columns = source.shape
    if turned is not None and source.element_size() != 2:
        # Bytes that come from float32 are transposed wrongly inside a kernel; see cast_kernel.
        launch(source.t(), turned, None)
        turned = None
    if not source.numel() or (plain is None and turned is None):
        return
    source = source.contiguous()
    if turned is None and plain is not None:
        _cast_each_row[(rows,)](source, plain[0].view(torch.uint8), plain[1], columns, WIDTH)
        return
    largest = source.new_zeros(rows + columns, dtype=torch.int32)
    inputs, options = (source, largest[:rows], largest[rows:]), _options(source, plain, turned)
    _find_largest[grid(source)](*inputs, rows, columns, **options)
    layouts = (plain or turned or (), turned or ())  # a kernel leaves what it is not to write
    targets = [part for values, by in layouts for part in (values.view(torch.uint8), by)]
    _cast_rows[grid(source)](*inputs, *targets, rows, columns, **options)


def _options(source: Tensor, plain: Layout | None, turned: Layout | None) -> dict[str, Any]:
    classes = map(size_class, source.shape)
    return dict(zip(SIZES, (*classes, plain is not None, turned is not None), strict=True))


def wrong_casts(source_dtype: torch.dtype, device: torch.device) -> list[str]:
    """Cast a matrix with each tile of the tuners; return those whose bits are not torch's.

    See wrong_tiles of cast_kernel.
    """
    numbers = torch.Generator().manual_seed(0)
    source = torch.randn(TRIED, generator=numbers).to(device, source_dtype)
    wrong = []
    for tile in TILES:
        for wanted in ((True, True), (True, False), (False, True)):
            with only(tile, _find_largest, _cast_rows):
                found = cast_on_gpu(source, *wanted)
            pairs = zip(found, define(source, *wanted), strict=True)
            if not all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs):
                wrong.append(f"rows, tile {tile}, layouts {wanted}")
    return wrong
