"""Find the weights that a checkpoint holds rounded, by its config and the names of its tensors.

Each becomes one weight that can be read by rows, so that a rank reads what it needs of the tensors
it is stored in.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any

import torch

from raytrain_adv.errors import JobError
from raytrain_adv.ops.stored import decode

KEY = "quantization_config"
Read = Callable[[str, tuple[slice, ...] | None], torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]
Decode = Callable[..., torch.Tensor]
UNUSED = re.compile(
    r"\.((input|output)_(scale|zero_point|global_scale|scale_ub)|activation_scale|[kvq]_scale"
    r"|weight_shape|weight_format|(weight\.)?quant_state\.bitsandbytes__\w+)$"
)
"""Tensors beside rounded weights that say how to round something else, or what was read already."""

FORMATS = {f"{kind}-quantized" for kind in ("pack", "int", "float", "naive", "mxfp8")} | {
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mixed-precision",
    "dense",
}
"""Formats of compressed-tensors that are read."""


@dataclass(frozen=True)
class Part:
    """A tensor that a weight is stored in."""

    name: str
    axis: int | None = None
    """The axis along which the weight's rows lie; none if all rows need all of it."""
    per_row: Fraction = Fraction(1)
    """Indices of that axis per row."""

    def where(self, first: int, last: int, shape: tuple[int, ...]) -> tuple[slice, ...] | None:
        """Return which part of the tensor of `shape` the rows from `first` to `last` need."""
        if self.axis is None:
            return None
        rows = slice(math.floor(first * self.per_row), math.ceil(last * self.per_row))
        return tuple(rows if i == self.axis else slice(0, n) for i, n in enumerate(shape))


@dataclass(frozen=True)
class Stored:
    """A weight that is stored rounded."""

    shape: tuple[int, ...]
    parts: Mapping[str, Part]
    """Argument of `decode` -> where it is read."""
    decode: Decode
    """Returns the read rows' values, float32."""
    by: int = 1
    """Rows are read from a multiple of this, to a multiple or the end."""

    def read(self, read: Read, shapes: Shapes, region: tuple[slice, ...] | None) -> torch.Tensor:
        """Return the weight's values in a region; none is all of it."""
        region = region or tuple(slice(0, n) for n in self.shape)
        wanted = region[0]
        first = wanted.start // self.by * self.by
        last = min(-(-max(wanted.stop, first + 1) // self.by) * self.by, self.shape[0])
        held = {
            argument: read(part.name, part.where(first, last, shapes[part.name]))
            for argument, part in self.parts.items()
        }
        rows = self.decode(**held).reshape(-1, *self.shape[1:])[: last - first]
        return rows[(slice(wanted.start - first, wanted.stop - first), *region[1:])]

    def read_float8(
        self, read: Read, shapes: Shapes, rows: slice, across: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return rows as they are stored, float8_e4m3fn, and their scales [rows, blocks], if blocks
        of `across` columns have one; none for any other form.
        """
        keys = self.decode.keywords if isinstance(self.decode, partial) else {}
        block = keys.get("block", (0, 0))
        if self.parts.keys() != {"weight", "scale"} or block[1] != across:
            return None
        weight, scale = self.parts["weight"], self.parts["scale"]
        held = read(weight.name, weight.where(rows.start, rows.stop, shapes[weight.name]))
        if held.dtype != torch.float8_e4m3fn or len(shapes[scale.name]) != 2:
            return None
        grid = decode.exponents(read(scale.name, None))
        return held, grid[torch.arange(rows.start, rows.stop) // block[0]]


def method_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what a model's config.json has about rounded weights, or its text part's has."""
    text = config.get("text_config")
    found = config.get(KEY) or (text.get(KEY) if isinstance(text, dict) else None)
    return found if isinstance(found, dict) or found is None else {"quant_method": str(found)}


def forget(config: Any) -> None:
    """Delete from a model's config what it has about rounded weights."""
    for part in (config, config.get_text_config()):
        if hasattr(part, KEY):
            delattr(part, KEY)


def refuse_unknown(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint with rounded weights whose values this package cannot compute. Raises
    JobError, naming the method.
    """
    if (about := method_of(config)) is None:
        return
    method = about.get("quant_method", "no quant_method")
    why = "" if method in METHODS else "it is not known here"
    if method == "gptq" and about.get("bits") not in (2, 4, 8):
        why = f"bits: {about.get('bits')}"
    if method == "awq" and (about.get("bits"), about.get("version", "gemm").lower()) != (4, "gemm"):
        why = f"bits: {about.get('bits')}, version: {about.get('version')}"
    if method == "compressed-tensors":
        why = ", ".join(_unknown_parts(about))
    if why:
        raise JobError(
            f"{name} holds quantized weights in a form that cannot be read",
            f"config.json has {KEY} ({method}): {why}",
            f"use the unquantized checkpoint it was made from, or one of {', '.join(METHODS)}",
        )


def describe(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what happens to a checkpoint's rounded weights, if it has any."""
    if (about := method_of(config)) is not None:
        kind = " ".join(str(about[k]) for k in ("quant_method", "format") if about.get(k))
        yield (
            f"the checkpoint holds quantized weights ({kind}): they are read as their values, and "
            "a model that is exported is not quantized; under LoRA, quantization_bit: 8 with "
            "quantization_type: fp8_blocks keeps weights in FP8 blocks as they are"
        )


def _unknown_parts(about: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a config of compressed-tensors has that is not read."""
    groups = [group for group in about.get("config_groups", {}).values() if group.get("weights")]
    formats = {about.get("format"), *(group.get("format") for group in groups)} - {None}
    yield from (f"format: {name}" for name in sorted(formats - FORMATS))
    packed = about.get("format") in ("pack-quantized", "mixed-precision")
    for bits in {group["weights"].get("num_bits") for group in groups}:
        if packed and bits not in (2, 4, 8):
            yield f"num_bits: {bits}"
    for key in ("sparsity_config", "transform_config"):
        if (about.get(key) or {}).get("format", "dense") != "dense" or (
            (about.get(key) or {}).get("config_groups")
        ):
            yield key


def find(config: Mapping[str, Any], shapes: Shapes, read: Read) -> dict[str, Stored]:
    """Return the rounded weights of a checkpoint by their name in the model; none if its
    config.json does not say that it has any.
    """
    about = method_of(config) or {}
    method = METHODS.get(about.get("quant_method", ""))
    return dict(method(about, shapes, read)) if method else {}


def logical(stored: Mapping[str, Stored], shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Return name and shape of what a checkpoint stands for: its weights, with values."""
    used = {part.name for weight in stored.values() for part in weight.parts.values()}
    plain = {n: s for n, s in shapes.items() if n not in used and not UNUSED.search(n)}
    return plain | {name: weight.shape for name, weight in stored.items()}


Found = Iterator[tuple[str, Stored]]


def _stems(shapes: Shapes, ending: str) -> Iterator[str]:
    """Yield what comes before this ending in the names that have it."""
    return (name.removesuffix(ending) for name in shapes if name.endswith(ending))


def _per_block(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, int]:
    """Return how many blocks of this size a weight of this shape has, downward and across."""
    return -(-shape[-2] // block[-2]), -(-shape[-1] // block[-1])


def _scaled(shapes: Shapes, weight: str, scale: str, blocks: Iterable[tuple[int, int]]) -> Stored:
    """Return a weight of numbers with factors per tensor, row, group of a row, or block: one of
    `blocks` if it makes that many factors.
    """
    shape = shapes[weight]
    grid = (*shapes[scale], 1, 1)[: max(2, len(shapes[scale]))]
    counts = grid[-2:]
    fitting = (one for one in blocks if _per_block(shape, one) == counts)
    down, across = next(fitting, _per_block(shape, counts))
    by_rows = len(shape) == 2
    spread = grid[0] != 1  # else one factor, or one row of them, is for all rows
    down = down if spread or not by_rows else 2**31
    where = Part(scale, 0 if spread else None, Fraction(1, down if by_rows else 1))
    parts = {"weight": Part(weight, 0), "scale": where}
    zero = f"{weight}_zero_point"
    if zero in shapes:
        parts["zero"] = replace(where, name=zero)
    values = partial(decode.scaled, block=(down, across))
    return Stored(shape, parts, values, down if by_rows and spread else 1)


def _blocks(about: Mapping[str, Any], shapes: Shapes, read: Read) -> Found:
    """float8 in blocks with the factors beside the weight (DeepSeek-V3, `*-FP8`)."""
    found = about.get("weight_block_size")
    blocks = [(int(found[0]), int(found[1]))] if found else []
    for weight in _stems(shapes, "_scale_inv"):
        yield weight, _scaled(shapes, weight, f"{weight}_scale_inv", blocks)


def _rows(about: Mapping[str, Any], shapes: Shapes, read: Read) -> Found:
    """float8 with a factor per row (fbgemm)."""
    for weight in _stems(shapes, "_scale"):
        if weight in shapes:
            yield weight, _scaled(shapes, weight, f"{weight}_scale", ())


def _mxfp4(about: Mapping[str, Any], shapes: Shapes, read: Read) -> Found:
    """4-bit floats in blocks of 32 of stacked experts (gpt-oss)."""
    for stem in _stems(shapes, "_blocks"):
        experts, rows, groups, size = shapes[f"{stem}_blocks"]
        parts = {kind: Part(f"{stem}_{kind}", 0) for kind in ("blocks", "scales")}
        yield stem, Stored((experts, groups * size * 2, rows), parts, decode.mxfp4)


def _compressed(about: Mapping[str, Any], shapes: Shapes, read: Read) -> Found:
    """compressed-tensors: integers, float8 or 4-bit floats, as the tensors beside them tell."""
    blocks = list(_group_blocks(about.get("config_groups", {})))
    for weight in _stems(shapes, "_scale"):
        scale, packed, overall = (f"{weight}_{s}" for s in ("scale", "packed", "global_scale"))
        if weight in shapes:
            yield weight, _scaled(shapes, weight, scale, blocks)
        elif f"{weight}_shape" in shapes:
            yield weight, _packed(shapes, weight, read(f"{weight}_shape", None).tolist())
        elif packed in shapes:
            rows, half = shapes[packed]
            parts = {"packed": Part(packed, 0), "scale": Part(scale, 0)}
            values: Decode = decode.mxfp4_rows
            if overall in shapes:
                parts["overall"], values = Part(overall), decode.nvfp4
            yield weight, Stored((rows, 2 * half), parts, values)


def _group_blocks(groups: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Yield the blocks of compressed-tensors' groups that have any."""
    found = ((group.get("weights") or {}).get("block_structure") for group in groups.values())
    for block in filter(None, found):
        down, across = block.split("x") if isinstance(block, str) else block
        yield int(down), int(across)


def _packed(shapes: Shapes, weight: str, shape: list[int]) -> Stored:
    rows, columns = shape
    by = 1
    parts = {kind: Part(f"{weight}_{kind}", 0) for kind in ("packed", "scale")}
    per_int = -(-columns // shapes[parts["packed"].name][1])
    if (zero := f"{weight}_zero_point") in shapes:
        by = per_int if shapes[zero][0] != rows else 1
        parts["zero"] = Part(zero, 0, Fraction(1, by))
    if (groups := f"{weight}_g_idx") in shapes:
        parts["groups"] = Part(groups)
    return Stored((rows, columns), parts, partial(decode.packed_integers, columns=columns), by)


def _gptq(about: Mapping[str, Any], shapes: Shapes, read: Read) -> Found:
    bits = int(about["bits"])
    per_int = 32 // bits
    offset = 0 if about.get("checkpoint_format") == "gptq_v2" else 1
    values = partial(decode.gptq, bits=bits, zero_offset=offset)
    for stem in _stems(shapes, ".qweight"):
        packed, rows = shapes[f"{stem}.qweight"]
        parts = {
            "packed": Part(f"{stem}.qweight", 1),
            "zeros": Part(f"{stem}.qzeros", 1, Fraction(1, per_int)),
            "scales": Part(f"{stem}.scales", 1),
            "groups": Part(f"{stem}.g_idx"),
        }
        yield f"{stem}.weight", Stored((rows, packed * per_int), parts, values, per_int)


def _awq(about: Mapping[str, Any], shapes: Shapes, read: Read) -> Found:
    eighth = Fraction(1, 8)
    for stem in _stems(shapes, ".qweight"):
        columns, packed = shapes[f"{stem}.qweight"]
        parts = {
            "packed": Part(f"{stem}.qweight", 1, eighth),
            "zeros": Part(f"{stem}.qzeros", 1, eighth),
            "scales": Part(f"{stem}.scales", 1),
        }
        yield f"{stem}.weight", Stored((packed * 8, columns), parts, decode.awq, 8)


def _bitsandbytes(about: Mapping[str, Any], shapes: Shapes, read: Read) -> Found:
    for stem in _stems(shapes, ".SCB"):
        weight = f"{stem}.weight"
        parts = {"weight": Part(weight, 0), "scale": Part(f"{stem}.SCB", 0)}
        yield weight, Stored(shapes[weight], parts, decode.rows8)
    for kind in ("nf4", "fp4"):
        ending = f".quant_state.bitsandbytes__{kind}"
        for weight in _stems(shapes, ending):
            state = json.loads(bytes(read(weight + ending, None).tolist()))
            yield weight, _bits4(shapes, weight, state)


def _bits4(shapes: Shapes, weight: str, state: Mapping[str, Any]) -> Stored:
    shape, block = tuple(state["shape"]), int(state["blocksize"])
    size, per_row = math.prod(shape), math.prod(shape[1:])
    parts = {
        "packed": Part(weight, 0, Fraction(per_row * shapes[weight][0], size)),
        "table": Part(f"{weight}.quant_map"),
        "scale": Part(f"{weight}.absmax", 0, Fraction(per_row, block)),
    }
    whole, values = block, partial(decode.bits4, block=block)
    if "nested_blocksize" in state:
        inner = int(state["nested_blocksize"])
        whole = block * inner
        parts["outer"] = Part(f"{weight}.nested_absmax", 0, Fraction(per_row, whole))
        parts["outer_table"] = Part(f"{weight}.nested_quant_map")
        values = partial(values, inner=inner, offset=float(state["nested_offset"]))
    # Rows are read from one that begins a block.
    return Stored(shape, parts, values, whole // math.gcd(whole, per_row))


def _aqlm(about: Mapping[str, Any], shapes: Shapes, read: Read) -> Found:
    for stem in _stems(shapes, ".codes"):
        groups, across, _ = shapes[f"{stem}.codes"]
        *_, down, wide = shapes[f"{stem}.codebooks"]
        parts = {
            "codes": Part(f"{stem}.codes", 0, Fraction(1, down)),
            "books": Part(f"{stem}.codebooks"),
            "scales": Part(f"{stem}.scales", 0, Fraction(1, down)),
        }
        yield f"{stem}.weight", Stored((groups * down, across * wide), parts, decode.aqlm, down)


METHODS: dict[str, Callable[[Mapping[str, Any], Shapes, Read], Found]] = {
    "fp8": _blocks,
    "fbgemm_fp8": _rows,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed,
    "bitsandbytes": _bitsandbytes,
    "gptq": _gptq,
    "awq": _awq,
    "aqlm": _aqlm,
}
