"""Rewrite a tiny checkpoint with rounded weights, as the tools of each format write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

Tensors = dict[str, torch.Tensor]
Writer = Callable[[str, torch.Tensor], Tensors]


def rewrite(folder: Path, about: dict[str, Any], write: Writer) -> Path:
    """Replace the linears' weights by what `write` returns for a name (without .weight) and one."""
    held: Tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        is_linear = stem.endswith("_proj") and tensor.ndim == 2
        held |= write(stem, tensor.float()) if is_linear else {name: tensor}
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = about
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def float8(block: int | None) -> Writer:
    """float8 in blocks, or with one factor per weight."""

    def write(stem: str, weight: torch.Tensor) -> Tensors:
        down, across = (block, block) if block else weight.shape
        rows, columns = (
            -(-n // size) for n, size in zip(weight.shape, (down, across), strict=True)
        )
        scale = torch.rand(rows, columns) * 1e-3 + 1e-3
        whole = scale.repeat_interleave(down, 0).repeat_interleave(across, 1)
        values = (weight / whole[: weight.shape[0], : weight.shape[1]]).clamp(-448, 448)
        held = {f"{stem}.weight": values.to(torch.float8_e4m3fn)}
        return held | {f"{stem}.weight_scale_inv": scale if block else scale.squeeze()}

    return write


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack unsigned integers [..., n] into int32 [..., n * bits / 32], the first in the lowest."""
    shifts = torch.arange(0, 32, bits)
    packed = (values.long().unflatten(-1, (-1, 32 // bits)) << shifts).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def gptq(bits: int, sorted_columns: bool) -> Writer:
    """GPTQ with 16 columns to a group."""

    def write(stem: str, weight: torch.Tensor) -> Tensors:
        rows, columns = weight.shape
        groups = torch.arange(columns) // 16
        if sorted_columns:
            groups = groups[torch.randperm(columns)]
        return {
            f"{stem}.qweight": pack(torch.randint(0, 2**bits, (rows, columns)), bits)
            .t()
            .contiguous(),
            f"{stem}.qzeros": pack(torch.randint(0, 2**bits, (-(-columns // 16), rows)), bits),
            f"{stem}.scales": torch.rand(-(-columns // 16), rows).half(),
            f"{stem}.g_idx": groups.int(),
        }

    return write


def awq(stem: str, weight: torch.Tensor) -> Tensors:
    """AWQ (gemm) with 8 columns to a group."""
    rows, columns = weight.shape
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(outer: int) -> torch.Tensor:
        values = torch.randint(0, 16, (outer, rows))
        return pack(values.unflatten(-1, (-1, 8))[..., order].flatten(-2), 4)

    scales = torch.rand(columns // 8, rows).half()
    return {f"{stem}.qweight": packed(columns), f"{stem}.qzeros": packed(columns // 8)} | {
        f"{stem}.scales": scales
    }


def bitsandbytes(folder: Path, **how: Any) -> Path:
    """Let transformers round a checkpoint and save it."""
    about = BitsAndBytesConfig(**how)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=about, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(folder / "rounded")
    return folder / "rounded"
