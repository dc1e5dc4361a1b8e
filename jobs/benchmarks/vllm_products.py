"""Products of exported weights by vLLM's own CUDA kernels, for exported_products.py --vllm FOLDER.

FOLDER is an unpacked wheel of vLLM for the installed PyTorch: its kernels are loaded alone. Calls
and layouts are those of vllm/_custom_ops.py and vllm/model_executor/kernels/linear (0.22.1, for
PyTorch 2.11).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
LIBRARIES = ("_C_stable_libtorch.abi3.so", "_C.abi3.so")
SCALES_OF_TILES = [row + 8 * column for row in range(8) for column in range(8)]
"""The order of groups' scales in Marlin, for 64 outputs."""


def load(folder: Path) -> None:
    """Register vLLM's operators. Raises OSError if a library does not fit the installed PyTorch."""
    for library in LIBRARIES:
        torch.ops.load_library(folder / "vllm" / library)
    description = importlib.util.spec_from_file_location(
        "vllm_scalar_type", folder / "vllm" / "scalar_type.py"
    )
    assert description is not None and description.loader is not None
    module = importlib.util.module_from_spec(description)
    sys.modules["vllm_scalar_type"] = module  # its dataclass looks itself up
    description.loader.exec_module(module)


def int4_id() -> int:
    """Return vLLM's number of 4-bit integers that are stored with 8 added."""
    return int(sys.modules["vllm_scalar_type"].scalar_types.uint4b8.id)


def int8(held: dict[str, Tensor]) -> Product:
    """CUTLASS: int8 weights, inputs with a scale and a zero point per token."""
    weight, scale = held["weight"], held["weight_scale"].to(torch.float32).view(1, -1)
    sums = weight.sum(1, dtype=torch.int32).view(1, -1)

    def multiply(x: Tensor) -> Tensor:
        values = torch.empty_like(x, dtype=torch.int8)
        x_scale = torch.empty(len(x), 1, device=x.device, dtype=torch.float32)
        zero_point = torch.empty(len(x), 1, device=x.device, dtype=torch.int32)
        torch.ops._C.dynamic_scaled_int8_quant(values, x, x_scale, zero_point)
        out = x.new_empty(len(x), len(weight))
        torch.ops._C.cutlass_scaled_mm_azp(
            out, values, weight.t(), x_scale, scale, sums, zero_point, None
        )
        return out

    return multiply


def float8(held: dict[str, Tensor]) -> Product:
    """CUTLASS: float8 weights with a scale per output, inputs with a scale per token."""
    weight, scale = held["weight"], held["weight_scale"].to(torch.float32).view(1, -1)

    def multiply(x: Tensor) -> Tensor:
        values = torch.empty_like(x, dtype=torch.float8_e4m3fn)
        x_scale = torch.empty(len(x), 1, device=x.device, dtype=torch.float32)
        torch.ops._C.dynamic_per_token_scaled_fp8_quant(values, x, x_scale, None)
        out = x.new_empty(len(x), len(weight))
        torch.ops._C.cutlass_scaled_mm(out, values, weight.t(), x_scale, scale, None)
        return out

    return multiply


def machete(held: dict[str, Tensor], group_size: int) -> Product:
    """Machete, which vLLM takes for W4A16 on Hopper."""
    packed, scale = held["weight_packed"], held["weight_scale"].t().contiguous()
    kind = int4_id()
    layout = torch.ops._C.machete_prepack_B(packed.t(), torch.bfloat16, kind, torch.bfloat16)

    def multiply(x: Tensor) -> Tensor:
        out: Tensor = torch.ops._C.machete_mm(
            x, layout, kind, None, scale, None, group_size, None, None, None
        )
        return out

    return multiply


def marlin(held: dict[str, Tensor], group_size: int) -> Product:
    """Marlin, which vLLM takes for W4A16 on other GPUs."""
    packed = held["weight_packed"]
    outputs, inputs = packed.shape[0], packed.shape[1] * 8
    none = torch.empty(0, dtype=torch.int32, device=packed.device)
    words = packed.t().contiguous()
    layout = torch.ops._C.gptq_marlin_repack(words, none, inputs, outputs, 4, False)
    scale = held["weight_scale"].t().reshape(-1, 64)[:, SCALES_OF_TILES]
    scale = scale.reshape(-1, outputs).contiguous()
    processors = torch.cuda.get_device_properties(packed.device).multi_processor_count
    workspace = torch.zeros(processors, dtype=torch.int32, device=packed.device)

    def multiply(x: Tensor) -> Tensor:
        sizes = (len(x), outputs, inputs)
        arguments: tuple[Any, ...] = (x, None, layout, None, scale, None, None, none, none, none)
        out: Tensor = torch.ops._C.marlin_gemm(
            *arguments, workspace, int4_id(), *sizes, True, False, True, False
        )
        return out

    return multiply


def forms(group_sizes: tuple[int, ...]) -> dict[str, tuple[str, Callable[..., Product]]]:
    """Return a title -> the exported form whose bytes it multiplies, and what multiplies them."""
    found: dict[str, tuple[str, Callable[..., Product]]] = {
        "W8A8, vLLM's CUTLASS": ("W8A8", int8),
        "FP8, vLLM's CUTLASS": ("FP8", float8),
    }
    for size in group_sizes:
        form = f"W4A16, groups of {size}"
        if size in (64, 128):  # Machete has no others, but whole channels
            found[f"{form}, vLLM's Machete"] = (form, partial(machete, group_size=size))
        found[f"{form}, vLLM's Marlin"] = (form, partial(marlin, group_size=size))
    return found
