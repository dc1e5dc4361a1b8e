"""Products of experts in FP8 and in bf16: forward and backward with casts, one GPU.

    python jobs/benchmarks/grouped_products.py --out jobs/benchmarks/results/grouped_products.json

`torch._grouped_mm` in bfloat16 is compared with `torch._scaled_grouped_mm` in float8, one scale per
row, for both matrices of one layer's experts: gate and up [experts, 2 x inner, hidden], down
[experts, hidden, inner]. "FP8" rounds and multiplies forward, for the inputs' gradient and for the
weights' gradient, by torchao's kernels. "FP8 without casts" multiplies what was rounded before: no
implementation can be faster. Tokens are routed evenly, or so that the busiest eighth of the experts
gets half of them; each expert gets a multiple of 16, which FP8 needs and bf16 does not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

SHAPES = {
    # name: experts, active ones per token, hidden size, inner size
    "Qwen3-30B-A3B": (128, 8, 2048, 768),
    "gpt-oss-20b": (32, 4, 2880, 2880),
    "Mixtral 8x7B": (8, 2, 4096, 14336),
}
E4M3 = torch.float8_e4m3fn
REPEATS, WARM_UP = 20, 5
WAYS = ("bf16 forward", "FP8 forward", "bf16", "FP8", "FP8 without casts")


def ends(num_rows: int, experts: int, is_even: bool) -> torch.Tensor:
    """Return where each expert's rows end, multiples of 16: int32 [experts]."""
    shares = torch.full((experts,), 1.0)
    if not is_even:
        busy = max(1, experts // 8)
        shares[:busy] = (experts - busy) / busy  # half of all tokens
    last = (shares.cumsum(0) / shares.sum() * (num_rows // 16)).round().to(torch.int32) * 16
    return last.cuda()


def milliseconds(work: Callable[[], object]) -> float:
    """Return the median time of a function's kernels."""
    for _ in range(WARM_UP):
        work()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def by_row(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a tensor in float8, and float32 scales of its rows [...]."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / torch.finfo(E4M3).max
    return (x.float() / scale).to(E4M3), scale.squeeze(-1)


def in_bf16(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """Return each expert's rows times its weight [experts, out, in]."""
    return torch._grouped_mm(x, weight.transpose(-2, -1), offs=offs)


def in_fp8(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """Return the same from rounded factors; its backward rounds too."""
    from torchao.prototype.moe_training.fp8_grouped_mm import (
        _to_fp8_rowwise_then_scaled_grouped_mm as product,
    )

    transposed = weight.transpose(-2, -1)
    return product(x, transposed, offs, pad_token_groups_for_grouped_mm=False)


def both(product: Callable[..., torch.Tensor], case: dict[str, torch.Tensor]) -> None:
    """Multiply forward and backward."""
    x, weight = case["x"].detach().requires_grad_(), case["weight"].detach().requires_grad_()
    torch.autograd.grad(product(x, weight, case["offs"]), (x, weight), case["gradient"])


def fp8_products(case: dict[str, torch.Tensor]) -> Callable[[], object]:
    """Return the three products of a training step on factors that are rounded already."""
    offs, weight, x, gradient = (case[k] for k in ("offs", "weight", "x", "gradient"))
    experts, width = len(offs), x.shape[1]
    x8, x_scale = by_row(x)
    w8, w_scale = by_row(weight)
    g8, g_scale = by_row(gradient)
    back8, back_scale = by_row(weight.transpose(-2, -1).contiguous())
    gt8, _ = by_row(gradient.t().contiguous())
    xt8, _ = by_row(x.t().contiguous())
    of_out = torch.ones(experts, gradient.shape[1], device="cuda").flatten()
    of_in = torch.ones(experts, width, device="cuda").flatten()
    keys: dict[str, Any] = {"out_dtype": torch.bfloat16, "use_fast_accum": True}

    def multiply() -> None:
        scaled = torch._scaled_grouped_mm
        scaled(x8, w8.transpose(-2, -1), x_scale, w_scale, offs, **keys)
        scaled(g8, back8.transpose(-2, -1), g_scale, back_scale, offs, **keys)
        scaled(gt8, xt8.t(), of_out, of_in, offs, **keys)

    return multiply


def forward_fp8(case: dict[str, torch.Tensor]) -> Callable[[], object]:
    """Return the product of a forward pass alone, casts in one compiled function."""
    cast = torch.compile(by_row)

    def multiply() -> None:
        x8, x_scale = cast(case["x"])
        w8, w_scale = cast(case["weight"])
        torch._scaled_grouped_mm(
            x8,
            w8.transpose(-2, -1),
            x_scale,
            w_scale,
            case["offs"],
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    return multiply


def measure(case: dict[str, torch.Tensor]) -> dict[str, float | str]:
    """Return each way's milliseconds, or the error it ended in."""
    ways: dict[str, Callable[[], Callable[[], object]]] = {
        "bf16 forward": lambda: lambda: in_bf16(case["x"], case["weight"], case["offs"]),
        "FP8 forward": lambda: forward_fp8(case),
        "bf16": lambda: lambda: both(in_bf16, case),
        "FP8": lambda: lambda: both(in_fp8, case),
        "FP8 without casts": lambda: fp8_products(case),
    }
    found: dict[str, float | str] = {}
    for name, way in ways.items():
        try:
            found[name] = round(milliseconds(way()), 3)
        except Exception as error:  # a way that fails is a result too, and the others go on
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
        torch.cuda.empty_cache()
    return found


def made(experts: int, rows: int, out: int, width: int, is_even: bool) -> dict[str, torch.Tensor]:
    """Return random factors of one product."""
    torch.manual_seed(0)
    make: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    return {
        "x": torch.randn(rows, width, **make),
        "weight": torch.randn(experts, out, width, **make) * 0.02,
        "gradient": torch.randn(rows, out, **make) * 0.01,
        "offs": ends(rows, experts, is_even),
    }


def line(row: dict[str, Any]) -> str:
    """Return a row of the table: milliseconds, and how much faster FP8 is."""
    bf16, fp8, bare = (row[k] for k in ("bf16", "FP8", "FP8 without casts"))
    figures = [f"{row[k]:9.3f}" if isinstance(row[k], float) else "    error" for k in WAYS]
    gains = [
        f"{bf16 / other:5.2f}x" if isinstance(bf16, float) and isinstance(other, float) else "   - "
        for other in (fp8, bare)
    ]
    case = f"{row['model']:14} {row['matrix']:10} {row['routing']:7}"
    return " ".join([case, *figures, *gains])


def main() -> None:
    """Measure, print a table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("grouped_products.json"))
    parser.add_argument("--tokens", type=int, default=8192)
    given = parser.parse_args()
    heads = "".join(f"{name[:9]:>10}" for name in WAYS)
    print(f"{'model':14} {'matrix':10} {'routing':7}{heads}  FP8  without casts")
    rows: list[dict[str, Any]] = []
    for model, (experts, active, hidden, inner) in SHAPES.items():
        matrices = {"gate, up": (2 * inner, hidden), "down": (hidden, inner)}
        for matrix, (out, width) in matrices.items():
            for routing in ("even", "uneven"):
                row = {"model": model, "matrix": matrix, "routing": routing}
                try:
                    case = made(experts, given.tokens * active, out, width, routing == "even")
                    row |= measure(case)
                except Exception as error:  # as above
                    row |= dict.fromkeys(WAYS, f"{type(error).__name__}: {error}")
                rows.append(row)
                print(line(row), flush=True)
                for way in WAYS:
                    if isinstance(row[way], str):
                        print(f"    {way}: {row[way]}", flush=True)
    device = torch.cuda.get_device_name()
    result = {"date": str(date.today()), "command": " ".join(["python", *sys.argv])}
    result |= {"device": device, "torch": torch.__version__, "tokens": given.tokens, "rows": rows}
    given.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{device}, torch {torch.__version__}: written to {given.out}")


if __name__ == "__main__":
    main()
