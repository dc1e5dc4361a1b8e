"""Weights in compressed-tensors' layouts, as vLLM, SGLang and transformers read them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raytrain_adv.ops.fake_quant.engine_rounding import (
    NVFP4_GLOBAL_SCALE,
    quantize_float4,
    quantize_float8_blocks,
    quantize_rows,
)
from raytrain_adv.ops.fake_quant.layers import rounded_weight
from raytrain_adv.ops.fake_quant.rounding import BITS, integers_of, quantize_float8
from raytrain_adv.ops.fake_quant.targets import (
    BLOCK,
    FLOAT8_BLOCKS,
    FLOAT8_GROUPS,
    FLOAT8_IN_FLOAT32,
    FLOAT8_ROWS,
    FOUR_BIT_FLOATS,
    INT8_IN_FLOAT32,
    INTEGERS,
    MXFP4,
    NVFP4,
)
from raytrain_adv.ops.stored import decode

PER_WORD = 8
"""Four-bit integers in an int32."""
PACKED = "pack-quantized"
FORMATS = {
    INT8_IN_FLOAT32: INTEGERS,
    FLOAT8_ROWS: "float-quantized",
    FLOAT8_BLOCKS: "float-quantized",
    NVFP4: "nvfp4-pack-quantized",
    MXFP4: "mxfp4-pack-quantized",
}
"""Form of weights -> compressed-tensors' name; integers in groups are pack-quantized."""
IN_BYTES = {
    INT8_IN_FLOAT32: quantize_rows,
    FLOAT8_ROWS: quantize_float8,
    FLOAT8_BLOCKS: quantize_float8_blocks,
}
"""Form of weights that take a byte -> what rounds them, and returns values and scales."""
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Scheme:
    """How a linear's weight is stored, and its input rounded."""

    weight_form: str
    group_size: int | None
    """None: one scale per output channel."""
    activation_form: str
    """Empty: none."""

    @property
    def format(self) -> str:
        """compressed-tensors' name of it."""
        return FORMATS.get(self.weight_form, PACKED)


def stored(name: str, weight: torch.Tensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    """Return the tensors in which the weight `name` [rows, columns] is stored."""
    form, stem = scheme.weight_form, name.removesuffix("weight")
    if form in IN_BYTES:
        values, scale = IN_BYTES[form](weight)
        return {name: values, f"{stem}weight_scale": scale}
    if form in FOUR_BIT_FLOATS:
        return _stored_float4(stem, weight, form)
    size = scheme.group_size or weight.shape[1]
    rounded = integers_of(weight, BITS[form], size)
    return {
        f"{stem}weight_packed": _pack_int4(rounded.qdata),
        f"{stem}weight_scale": rounded.scale,
        f"{stem}weight_shape": torch.tensor(weight.shape, device=weight.device),
    }


def _stored_float4(stem: str, weight: torch.Tensor, form: str) -> dict[str, torch.Tensor]:
    values, scale = quantize_float4(weight, form)
    tensors = {f"{stem}weight_packed": _pack_float4(values)}
    if form == MXFP4:
        tensors[f"{stem}weight_scale"] = (scale.view(torch.int32) >> 23).to(torch.uint8)
        return tensors
    tensors[f"{stem}weight_scale"] = (scale * NVFP4_GLOBAL_SCALE).to(torch.float8_e4m3fn)
    tensors[f"{stem}weight_global_scale"] = scale.new_full((1,), NVFP4_GLOBAL_SCALE)
    return tensors


def _pack_int4(integers: torch.Tensor) -> torch.Tensor:
    """Return int8 [rows, columns] from -8 to 7 as int32, eight to a word, lowest bits first."""
    columns = integers.shape[1]
    padded = torch.nn.functional.pad(integers, (0, -columns % PER_WORD)).to(torch.int32) + 8
    words = padded.view(len(padded), -1, PER_WORD)
    shifts = 4 * torch.arange(PER_WORD, device=integers.device, dtype=torch.int32)
    packed: torch.Tensor = (words << shifts).sum(-1, dtype=torch.int32)
    return packed


def _pack_float4(values: torch.Tensor) -> torch.Tensor:
    """Return E2M1 values [rows, columns] as uint8, two to a byte, the first in the low bits."""
    table = torch.tensor(decode.E2M1, device=values.device, dtype=values.dtype)
    codes = torch.bucketize(values.abs(), table).to(torch.uint8)
    codes = codes | (torch.signbit(values).to(torch.uint8) << 3)
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def read_back(name: str, tensors: Tensors, scheme: Scheme, dtype: torch.dtype) -> torch.Tensor:
    """Return the values [rows, columns] of a stored weight, as an engine multiplies them."""
    form, stem = scheme.weight_form, name.removesuffix("weight")
    scale = tensors[f"{stem}weight_scale"]
    if name in tensors:
        block = (BLOCK, BLOCK) if form == FLOAT8_BLOCKS else (1, 1)
        return decode.scaled(tensors[name], scale, block).to(dtype)
    packed = tensors[f"{stem}weight_packed"]
    if form == MXFP4:
        found = decode.mxfp4_rows(packed, scale)
    elif form == NVFP4:
        found = decode.nvfp4(packed, scale, tensors[f"{stem}weight_global_scale"])
    else:
        columns = int(tensors[f"{stem}weight_shape"][1])
        found = decode.packed_integers(packed, scale, columns)
    return found.to(dtype)


def difference(
    name: str, weight: torch.Tensor, tensors: Tensors, scheme: Scheme
) -> tuple[int, str]:
    """Return how many stored values are not those that training rounds the weight to, and one."""
    rounded, _ = rounded_weight(
        weight, scheme.weight_form, scheme.group_size or weight.shape[1], None
    )
    found = read_back(name, tensors, scheme, weight.dtype)
    if found.shape != rounded.shape:
        return rounded.numel(), f"shape {list(found.shape)}, {list(rounded.shape)} in training"
    wrong = (found != rounded).nonzero()
    if not len(wrong):
        return 0, ""
    place = tuple(wrong[0].tolist())
    return len(wrong), f"at {list(place)} {found[place]:.6g}, {rounded[place]:.6g} in training"


def describe(linears: Iterable[str], converted: Iterable[str], scheme: Scheme) -> dict[str, Any]:
    """Return what config.json has for engines.

    Args:
        linears: names of all the model's linears.
        converted: names of those that are stored by the scheme.
    """
    ignored = sorted(set(linears) - set(converted))
    group = {
        "targets": ["Linear"],
        "weights": _weights(scheme),
        "input_activations": _activations(scheme.activation_form),
        "output_activations": None,
        "format": scheme.format,
    }
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": scheme.format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ignored,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
    }


def read_scheme(folder: Path) -> dict[str, Any] | None:
    """Return how compressed-tensors stores a model folder's linears; none if it does not."""
    file = folder / "config.json"
    config = (json.loads(file.read_text()) if file.is_file() else {}).get("quantization_config")
    if not config or config.get("quant_method") != "compressed-tensors":
        return None
    group: dict[str, Any] = next(iter(config["config_groups"].values()))
    return {**group, "format": group.get("format") or config.get("format")}


def _weights(scheme: Scheme) -> dict[str, Any]:
    form = scheme.weight_form
    keys: dict[str, Any] = {"type": "int", "num_bits": BITS.get(form, 8), "strategy": "channel"}
    if form == FLOAT8_ROWS:
        keys |= {"type": "float"}
    elif form == FLOAT8_BLOCKS:
        block = [BLOCK, BLOCK]
        keys |= {"type": "float", "strategy": "block", "block_structure": block}
    elif form in FOUR_BIT_FLOATS:
        keys |= {"type": "float", "num_bits": 4, "group_size": FOUR_BIT_FLOATS[form]}
        keys |= (
            {"strategy": "group", "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
            if form == MXFP4
            else {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
        )
    elif form != INT8_IN_FLOAT32 and scheme.group_size:
        keys |= {"strategy": "group", "group_size": scheme.group_size}
    return {**keys, "symmetric": True, "dynamic": False, "observer": "minmax"}


def _activations(form: str) -> dict[str, Any] | None:
    if not form:
        return None
    is_float = form in (FLOAT8_IN_FLOAT32, FLOAT8_GROUPS)
    kind = {"type": "float" if is_float else "int", "symmetric": is_float, "num_bits": 8}
    if form == FLOAT8_GROUPS:
        return {**kind, "strategy": "group", "group_size": BLOCK, "dynamic": True}
    return {**kind, "strategy": "token", "dynamic": True}
