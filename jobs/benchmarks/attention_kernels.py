"""Attention by PyTorch (cuDNN's and its own flash kernel) and by FlashAttention-4, on one GPU.

    python jobs/benchmarks/attention_kernels.py [--out FILE]

Forward and backward of one layer's causal attention in bf16, medians; TFLOP/s count half of the
square. Packed rows are conversations of different lengths end to end: PyTorch takes a mask, a flash
kernel their bounds.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from whole_steps import head_of_results

from raytrain_adv.ops.flash_attention_4 import flash_attn_func, flash_attn_varlen_func
from raytrain_adv.text import first_line

SHAPES = {  # sequences, tokens, heads, heads of keys, features
    "8b, 8,192": (1, 8192, 32, 8, 128),
    "8b, 4 x 2,048": (4, 2048, 32, 8, 128),
    "8b, 32,768": (1, 32768, 32, 8, 128),
    "135m, 8,192": (1, 8192, 9, 3, 64),
}
BACKENDS = {"cudnn": [SDPBackend.CUDNN_ATTENTION], "flash": [SDPBackend.FLASH_ATTENTION]}
BACKENDS |= {"any": [*SDPBackend.__members__.values()][1:]}
PACKED = (0, 1000, 3000, 3100, 6000, 8192)


def sdpa(backend: str, mask: Tensor | None = None) -> Callable[..., Tensor]:
    """Return PyTorch's attention by a backend, with [sequences, time, heads, features]."""

    def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(BACKENDS[backend]):
            found = torch.nn.functional.scaled_dot_product_attention(
                *heads_first, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
        return found.transpose(1, 2)

    return compute


def measured(compute: Callable[..., Tensor], shape: tuple[int, ...]) -> dict[str, Any]:
    """Return milliseconds and TFLOP/s of a form of attention, or why there is none."""
    sequences, tokens, heads, key_heads, features = shape
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(sequences, tokens, h, features, device="cuda", dtype=torch.bfloat16)
        for h in (heads, key_heads, key_heads)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    pull = torch.randn_like(q)

    def both() -> None:
        torch.autograd.grad(compute(*inputs), inputs, pull)

    try:
        both()
        forward = triton.testing.do_bench(lambda: compute(*inputs), return_mode="median")
        whole = triton.testing.do_bench(both, return_mode="median")
    except Exception as error:  # the others are still wanted
        return {"failed": first_line(error)}
    tflop = 2 * sequences * tokens**2 * heads * features / 1e12
    backward = whole - forward
    rates = {"forward_tflops": 1e3 * tflop / forward, "backward_tflops": 2.5e3 * tflop / backward}
    return {"forward_ms": forward, "backward_ms": backward, **rates}


def main() -> None:
    """Measure each kernel at each shape, and packed rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    chosen = parser.parse_args()
    kernels = {"cudnn": sdpa("cudnn"), "flash": sdpa("flash"), "fa4": flash_attn_func}
    figures = {
        f"{shape}: {name}": measured(compute, sizes)
        for shape, sizes in SHAPES.items()
        for name, compute in kernels.items()
    }
    bounds = torch.tensor(PACKED, dtype=torch.int32, device="cuda")
    time = torch.arange(PACKED[-1], device="cuda")
    owner = torch.bucketize(time, bounds, right=True)
    mask = (owner[:, None] == owner) & (time[:, None] >= time)
    longest = max(b - a for a, b in itertools.pairwise(PACKED))

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = (x[0] for x in (q, k, v))
        return flash_attn_varlen_func(*flat, bounds, bounds, longest, longest)[None]

    sizes = SHAPES["8b, 8,192"]
    figures["8b, 8,192 in 5 packed rows: mask"] = measured(sdpa("any", mask[None, None]), sizes)
    figures["8b, 8,192 in 5 packed rows: fa4"] = measured(packed, sizes)
    for name, figure in figures.items():
        print(f"{name:<36}", json.dumps(figure))
    if chosen.out is not None:
        results = head_of_results(" ".join(["python", *sys.argv]))
        chosen.out.write_text(json.dumps({**results, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
