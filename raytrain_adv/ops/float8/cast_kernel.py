"""The Triton kernels of float8_cast: one read of a tile, one write per layout."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILES = [
    triton.Config({"ROWS": rows, "COLUMNS": columns}, num_warps=warps)
    for rows, columns, warps in ((64, 64, 4), (128, 64, 4), (64, 128, 4), (128, 128, 8))
]


def quick(call: Any, quantiles: Any) -> Any:
    """Time a tile size, for milliseconds: by itself Triton takes an eighth of a second for each."""
    return triton.testing.do_bench(call, warmup=2, rep=10, quantiles=quantiles)


def size_class(length: int) -> int:
    """Return a length for the choice of tiles, so that batches are not tuned in mid-training."""
    return 1 << max(length - 1, 0).bit_length()


BLOCK = 4096  # numbers that a program of the cast without a transpose takes
TRIED = (272, 528)
"""Size of the matrix that tiles are tried on: several tiles on either side, and a part of one."""


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def to_bytes(value, LARGEST: tl.constexpr, IS_E5M2: tl.constexpr):  # type: ignore[no-untyped-def] # its arguments are not Python values
    """Return the bytes of a value in float8, within its range."""
    # A NaN must come out as one, as in torch: minimum and maximum would give a bound.
    value = tl.clamp(value, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    # As bytes from here on: transposing float8 has been miscompiled (triton 3.7, triton#11111).
    if IS_E5M2:
        byte = value.to(tl.float8e5).to(tl.uint8, bitcast=True)
    else:
        byte = value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return byte


@triton.autotune(  # type: ignore[untyped-decorator]
    configs=TILES, key=["rows_class", "columns_class", "WRITE_PLAIN"], do_bench=quick
)
@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def _cast(  # type: ignore[no-untyped-def] # its arguments are not Python values
    source,
    scale,
    plain,
    transposed,
    rows,
    columns,
    rows_class,
    columns_class,
    LARGEST: tl.constexpr,
    IS_E5M2: tl.constexpr,
    WRITE_PLAIN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    offsets = row[:, None].to(tl.int64) * columns + column[None, :]
    value = tl.load(source + offsets, mask=inside, other=0.0).to(tl.float32) * tl.load(scale)
    byte = to_bytes(value, LARGEST, IS_E5M2)
    if WRITE_PLAIN:
        tl.store(plain + offsets, byte, mask=inside)
    offsets_t = column[:, None].to(tl.int64) * rows + row[None, :]
    inside_t = (column[:, None] < columns) & (row[None, :] < rows)
    tl.store(transposed + offsets_t, tl.trans(byte), mask=inside_t)


def grid(source: Tensor) -> Callable[[dict[str, Any]], tuple[int, int]]:
    """Return how many programs of a tile's size a matrix takes, by its columns and rows."""
    rows, columns = source.shape
    return lambda tile: (triton.cdiv(columns, tile["COLUMNS"]), triton.cdiv(rows, tile["ROWS"]))


def launch(source: Tensor, scale: Tensor, plain: Tensor | None, transposed: Tensor) -> None:
    """Write the cast of `source` into `plain`, if wanted, and into `transposed`."""
    rows, columns = source.shape
    dtype = transposed.dtype
    if source.element_size() != 2:
        # Bytes that come from float32 are transposed wrongly inside a kernel, with every tile
        # (triton 3.6 on an H100: tests/gpu). A separate kernel transposes them correctly.
        whole = transposed.new_empty(source.shape) if plain is None else plain
        launch_plain(source, scale, whole)
        launch_transpose(whole, transposed)
        return
    _cast[grid(source)](
        source.contiguous(),
        scale,
        (transposed if plain is None else plain).view(torch.uint8),
        transposed.view(torch.uint8),
        rows,
        columns,
        size_class(rows),
        size_class(columns),
        LARGEST=torch.finfo(dtype).max,
        IS_E5M2=dtype == torch.float8_e5m2,
        WRITE_PLAIN=plain is not None,
    )


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def _cast_plain(  # type: ignore[no-untyped-def] # its arguments are not Python values
    source, scale, target, size, LARGEST: tl.constexpr, IS_E5M2: tl.constexpr, BLOCK: tl.constexpr
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    value = tl.load(source + offsets, mask=inside, other=0.0).to(tl.float32) * tl.load(scale)
    tl.store(target + offsets, to_bytes(value, LARGEST, IS_E5M2), mask=inside)


def launch_plain(source: Tensor, scale: Tensor, target: Tensor) -> None:
    """Write the cast of `source` into `target`, of the same shape and contiguous."""
    size = source.numel()
    if not size:
        return
    _cast_plain[(triton.cdiv(size, BLOCK),)](
        source.contiguous(),
        scale,
        target.view(torch.uint8),
        size,
        LARGEST=torch.finfo(target.dtype).max,
        IS_E5M2=target.dtype == torch.float8_e5m2,
        BLOCK=BLOCK,
        num_warps=8,
    )


@triton.autotune(  # type: ignore[untyped-decorator]
    configs=TILES, key=["rows_class", "columns_class"], do_bench=quick
)
@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def _transpose(  # type: ignore[no-untyped-def] # its arguments are not Python values
    source,
    target,
    rows,
    columns,
    rows_class,
    columns_class,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    byte = tl.load(source + row[:, None].to(tl.int64) * columns + column[None, :], mask=inside)
    offsets_t = column[:, None].to(tl.int64) * rows + row[None, :]
    inside_t = (column[:, None] < columns) & (row[None, :] < rows)
    tl.store(target + offsets_t, tl.trans(byte), mask=inside_t)


def launch_transpose(source: Tensor, target: Tensor) -> None:
    """Write the transpose of a matrix of bytes, [rows, columns], into `target`."""
    rows, columns = source.shape
    _transpose[grid(source)](
        source.contiguous().view(torch.uint8),
        target.view(torch.uint8),
        rows,
        columns,
        size_class(rows),
        size_class(columns),
    )


def wrong_tiles(source_dtype: torch.dtype, device: torch.device) -> list[str]:
    """Cast a matrix with each tile of the tuner; return those whose bits are not torch's.

    The loss would not show a miscompiled tile, and among equally fast ones chance decides.
    """
    numbers = torch.Generator().manual_seed(0)
    source = torch.randn(TRIED, generator=numbers).to(device, source_dtype)
    wrong = []
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        largest = torch.finfo(dtype).max
        scale = largest / source.abs().max().float()
        value = (source.float() * scale).clamp(min=-largest, max=largest)
        expected = value.to(dtype).view(torch.uint8)
        for tile in TILES:
            with only(tile, _cast, _transpose):
                plain = source.new_empty(TRIED, dtype=dtype)
                found = [source.new_empty(TRIED[::-1], dtype=dtype) for _ in range(3)]
                launch(source, scale, plain, found[0])
                launch(source, scale, None, found[1])
                launch_transpose(plain, found[2])
            alone = torch.empty_like(plain)
            launch_plain(source, scale, alone)
            every = [plain, alone, *(x.t() for x in found)]
            if not all(torch.equal(x.view(torch.uint8), expected) for x in every):
                wrong.append(f"{str(dtype).removeprefix('torch.')}, tile {tile}")
    return wrong


@contextlib.contextmanager
def only(tile: Any, *tuners: Any) -> Iterator[None]:
    """Make the tuners take one tile."""
    kept = [(tuner.configs, tuner.cache) for tuner in tuners]
    try:
        for tuner in tuners:
            tuner.configs, tuner.cache = [tile], {}
        yield
    finally:
        for tuner, (configs, cache) in zip(tuners, kept, strict=True):
            tuner.configs, tuner.cache = configs, cache
