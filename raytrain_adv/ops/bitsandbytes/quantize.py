"""Weights in 4 or 8 bits, by bitsandbytes' kernels or as float8: rounding and unpacking.

FSDP2 casts all but the dtype that computes, so parameters of that dtype carry the bytes of packed
weights and scales. A row and its scales are whole bytes: shards are cut between rows.
"""

import importlib
import logging
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrain_adv.dtensor import copy_local
from raytrain_adv.ops.float8.cast import cast, scale_of

E4M3 = torch.float8_e4m3fn
FLOAT8_BLOCK = 128
"""Rows and columns that share a scale in blocks, as in DeepSeek-V3's checkpoints."""
SMALLEST_FLOAT8 = 2**-10  # half of its smallest step
BLOCK = 64  # weights of a row that share a scale in 4 bits; bitsandbytes' default
NESTED_BLOCK = 256
"""Scales that share one scale when they are quantized too; the only size supported."""
LARGEST_ITEM = 4
"""Rows of scales are filled up to a multiple of this, to be read as bfloat16 or float32."""
FP16 = torch.finfo(torch.float16)
SLACK = 1e-6  # what float32 arithmetic on scales may add, relative: kernels multiply by reciprocals


@dataclass(frozen=True)
class Form:
    """How a weight is held."""

    kind: Literal["nf4", "fp4", "int8", "fp8", "fp8_blocks"]
    """nf4 and fp4: 16 values in blocks of BLOCK; int8: bitsandbytes' LLM.int8, a scale per row;
    fp8: float8_e4m3fn with one scale per matrix, which is beside each row; fp8_blocks: with one per
    FLOAT8_BLOCK rows and columns, beside each row of the block."""
    nested: bool = False
    """Whether the scales are quantized too (double quantization); in 4 bits only."""

    @property
    def is_int8(self) -> bool:
        """Whether weights are integers of 8 bits."""
        return self.kind == "int8"

    @property
    def takes_byte(self) -> bool:
        """Whether a weight takes a byte."""
        return self.kind == "int8" or self.is_float8

    @property
    def is_float8(self) -> bool:
        """Whether weights are float8_e4m3fn."""
        return self.kind in ("fp8", "fp8_blocks")

    @property
    def block(self) -> int:
        """Return the rows and columns of float8 that share a scale in blocks; 0 without blocks."""
        return FLOAT8_BLOCK if self.kind == "fp8_blocks" else 0

    def num_scales(self, columns: int) -> int:
        """Return the scales of a row."""
        if self.takes_byte:
            return -(-columns // FLOAT8_BLOCK) if self.block else 1
        return columns // BLOCK

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row's weights."""
        return columns if self.takes_byte else columns // 2

    def padded_scale_bytes(self, columns: int) -> int:
        """Return the bytes that a row's scales are held in."""
        needed = self.num_scales(columns) * (1 if self.nested else 4)
        return -(-needed // LARGEST_ITEM) * LARGEST_ITEM

    def nested_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes of the scales' own scales and of what is added to them; 0 without."""
        return 4 * (1 + -(-rows * (columns // BLOCK) // NESTED_BLOCK)) if self.nested else 0

    def bits(self, rows: int, columns: int) -> float:
        """Return the bits per weight of a matrix, scales counted."""
        per_row = self.row_bytes(columns) + self.padded_scale_bytes(columns)
        return 8 * (rows * per_row + self.nested_bytes(rows, columns)) / (rows * columns)


def allocate(
    like: Tensor, form: Form, rows: int, columns: int, *experts: int
) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter | None]:
    """Return frozen parameters without values for the weights and scales of a matrix or of as many
    `experts`, both [*experts, rows, bytes], and for the scales of scales, [*experts, bytes].
    """

    def held(*shape: int) -> nn.Parameter:
        *outer, num_bytes = shape
        empty = like.new_empty((*outer, num_bytes // like.element_size()))
        return nn.Parameter(empty, requires_grad=False)

    return (
        held(*experts, rows, form.row_bytes(columns)),
        held(*experts, rows, form.padded_scale_bytes(columns)),
        held(*experts, form.nested_bytes(rows, columns)) if form.nested else None,
    )


def store(target: Tensor, values: Tensor) -> None:
    """Write bytes [..., n] into this rank's shard, whose rows may be longer."""
    padding = target.shape[-1] * target.element_size() - values.shape[-1]
    copy_local(target, F.pad(values, (0, padding)).contiguous().view(target.dtype))


@cache
def bitsandbytes() -> Any:
    """Import bitsandbytes, without letting it fetch anything.

    On CPUs with AVX512-BF16 it would load an unpinned kernel from the Hub for generation
    (bitsandbytes 0.50, backends/cpu/ops.py), unless the kernels package is missing. Remove when it
    loads it late.
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level, held = logger.level, sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment] # how Python marks what is not there
    logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if held is not None:
            sys.modules["kernels"] = held


@cache
def nested_map(device: torch.device) -> Tensor:
    """Return the 256 values that quantized scales are taken from, float32 on the device."""
    values: Tensor = bitsandbytes().functional.create_dynamic_map().to(device)
    return values


@cache
def widest_step(kind: str) -> float:
    """Return a 4-bit kind's largest rounding error, as a share of its block's largest value."""
    values = bitsandbytes().functional.get_4bit_type(kind, device="cpu").sort().values
    return float(values.diff().max()) / 2


@torch.no_grad()
def quantize(weight: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Round rows of a weight as bitsandbytes' Linear4bit and Linear8bitLt do, but no scales; in
    float8 the rows are a whole matrix.

    The weight is on the device whose kernels round; in 4 bits BLOCK divides its columns.

    Returns:
        The weights' bytes [rows, row_bytes] in uint8, and float32 scales [rows, blocks of a row].
    """
    rows = weight.shape[0]
    if form.is_float8:
        return to_float8(weight, largest_of(row_amax(weight, form), slice(0, rows), form))
    bnb = bitsandbytes()
    weight = weight.contiguous()
    if form.is_int8:
        packed, scale, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        return packed.view(torch.uint8), scale.view(rows, 1)
    packed, scale = torch.ops.bitsandbytes.quantize_4bit(weight, BLOCK, form.kind, torch.uint8)
    return packed.view(rows, -1), scale.view(rows, -1)


@torch.no_grad()
def row_amax(weight: Tensor, form: Form) -> Tensor:
    """Return the largest magnitudes of each row [rows, columns] per scale: [rows, scales]."""
    count = form.num_scales(weight.shape[1])
    if count == 1:
        return weight.abs().amax(1, keepdim=True)
    padding = count * FLOAT8_BLOCK - weight.shape[1]
    return F.pad(weight.abs(), (0, padding)).view(len(weight), count, FLOAT8_BLOCK).amax(2)


@torch.no_grad()
def largest_of(rows: Tensor, wanted: slice, form: Form) -> Tensor:
    """Return the largest magnitude for each scale of the wanted rows, [rows, scales], from those of
    all rows of the matrix; see row_amax.
    """
    if form.kind == "fp8":
        return rows.max().repeat(wanted.stop - wanted.start, 1)
    padding = -len(rows) % FLOAT8_BLOCK
    blocks = F.pad(rows, (0, 0, 0, padding)).view(-1, FLOAT8_BLOCK, rows.shape[1]).amax(1)
    return blocks.repeat_interleave(FLOAT8_BLOCK, 0)[wanted]


@torch.no_grad()
def to_float8(weight: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows of a matrix to float8, as Float8Linear does in each step; see quantize.

    `amax` is the largest magnitude that each scale is for, [rows, scales].
    """
    multiplier = scale_of(amax, E4M3)
    packed = cast(weight, spread_blocks(multiplier, weight.shape[1]), E4M3).view(torch.uint8)
    return packed, multiplier.reciprocal()


def spread_blocks(scale: Tensor, columns: int) -> Tensor:
    """Return float8's scales [rows, scales] for each column, or one for all."""
    if scale.shape[1] == 1:
        return scale
    return scale.repeat_interleave(FLOAT8_BLOCK, 1)[:, :columns]


@torch.no_grad()
def quantize_scales(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Round a whole weight's float32 scales [rows, blocks of a row] by double quantization.

    Returns:
        Their bytes, and float32 [1 + scales of scales], of which the first is added to all.
    """
    bitsandbytes()
    flat = scale.reshape(-1)
    offset = flat.mean()
    rounded, outer = torch.ops.bitsandbytes.quantize_blockwise(
        flat - offset, nested_map(scale.device), NESTED_BLOCK
    )
    return rounded.view(scale.shape), torch.cat((offset.view(1), outer))


def dequantize_scales(rounded: Tensor, outer: Tensor) -> Tensor:
    """Return the float32 scales [rows, blocks of a row] that quantize_scales has rounded."""
    bitsandbytes()
    flat: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
        rounded.reshape(-1),
        outer[1:].contiguous(),
        nested_map(rounded.device),
        NESTED_BLOCK,
        torch.float32,
    )
    return (flat + outer[0]).view(rounded.shape)


def round_scales(scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what quantize_scales does, the scales that result, and how much each may differ."""
    rounded, outer = quantize_scales(scale)
    step = float(nested_map(scale.device).diff().max()) / 2
    per_scale = outer[1:].repeat_interleave(NESTED_BLOCK)[: scale.numel()]
    return rounded, outer, dequantize_scales(rounded, outer), per_scale.view_as(scale) * step


def dequantize_each(rounded: Tensor, outer: Tensor) -> Tensor:
    """Return float32 scales of experts that were rounded one by one: [expert, scales] of bytes, and
    [expert, 1 + scales of scales]. The same multiplications as bitsandbytes', for all at once.
    """
    steps = outer[:, 1:].repeat_interleave(NESTED_BLOCK, dim=1)[:, : rounded.shape[1]]
    return nested_map(rounded.device)[rounded.int()] * steps + outer[:, :1]


def dequantize_rows(
    packed: Tensor, scale: Tensor, kind: str, columns: int, dtype: torch.dtype
) -> Tensor:
    """Return weights [rows, columns] of bytes [rows, row_bytes]; scales [rows, blocks of a row]."""
    shape = (packed.shape[0], columns)
    if kind == "int8":
        whole = torch.empty(shape, dtype=dtype, device=packed.device)
        return torch.mul(packed.view(torch.int8), scale * (1.0 / 127.0), out=whole)
    if kind.startswith("fp8"):
        return (packed.view(E4M3).to(torch.float32) * spread_blocks(scale, columns)).to(dtype)
    bitsandbytes()
    values: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        packed.reshape(-1, 1), scale.reshape(-1), BLOCK, kind, shape, dtype
    )
    return values


@torch.library.custom_op("raytrain_adv::dequantize", mutates_args=())
def dequantize(
    weight: Tensor,
    scale: Tensor,
    nested: Tensor | None,
    kind: str,
    columns: int,
    after: Tensor | None = None,
) -> Tensor:
    """Return the weight that a quantized linear's parameters stand for, in their own dtype.

    Args:
        weight: [rows, row_bytes / item size], bytes.
        scale: [rows, padded_scale_bytes / item size], bytes.
        nested: [nested_bytes / item size], bytes; none if scales are not quantized.
        kind: as in Form.
        columns: of the weight that is returned.
        after: unused; the gradient in backward, without which Inductor keeps forward's result.
    """
    packed = weight.view(torch.uint8)
    held: Any = kind  # a custom operator takes no Literal
    num_blocks = Form(held, nested is not None).num_scales(columns)
    if nested is None:
        scales = scale.view(torch.float32)[:, :num_blocks]
    else:
        rounded = scale.view(torch.uint8)[:, :num_blocks]
        outer = nested.view(torch.float32)
        if outer.ndim == 2:
            scales = dequantize_each(rounded.reshape(len(outer), -1), outer).view(rounded.shape)
        else:
            scales = dequantize_scales(rounded, outer)
    return dequantize_rows(packed, scales, kind, columns, weight.dtype)


@dequantize.register_fake
def _(weight: Tensor, scale: Tensor, nested: object, kind: str, columns: int, *_: object) -> Tensor:
    return weight.new_empty((weight.shape[0], columns))


@torch.no_grad()
def distance(weight: Tensor, rounded: Tensor, scale: Tensor, off: Tensor, form: Form) -> Tensor:
    """Return how far rounded weights are from the originals, both [rows, columns].

    Args:
        weight: as it was read, in the dtype that computes.
        rounded: unpacked.
        scale: [rows, blocks of a row], float32, before it was rounded itself.
        off: [rows, blocks of a row], how much rounding may have changed each scale.
        form: how the weight is packed.

    Returns:
        float64 [3]: sums of squared differences and squared weights, and the largest difference as
        a share of the largest that rounding explains.
    """
    if weight.numel() == 0:
        return torch.zeros(3, dtype=torch.float64, device=weight.device)
    original = weight.float()
    difference = rounded.float() - original
    sums = [difference.double().square().sum(), original.double().square().sum()]
    if form.is_float8:
        # Half a step of three bits, and below the normal range half the smallest step.
        last = torch.finfo(weight.dtype).eps + SLACK
        scale = spread_blocks(scale, original.shape[1])
        allowed = original.abs() * (2**-4 + last) + scale * SMALLEST_FLOAT8
        worst = (difference.abs() / allowed).max().nan_to_num(nan=float("inf"))
        return torch.stack([*sums, worst.double()])
    blocks = difference.abs().view(*scale.shape, -1)
    # In int8 the weights pass through float16, as bitsandbytes has it.
    step, cast = (0.5 / 127, FP16.eps) if form.is_int8 else (widest_step(form.kind), 0.0)
    last = (torch.finfo(weight.dtype).eps + cast) / 2 + SLACK
    allowed = step * scale + off + last * (scale + off) + FP16.smallest_normal * FP16.eps
    worst = (blocks.amax(-1) / allowed).max().nan_to_num(nan=float("inf"))
    return torch.stack([*sums, worst.double()])
