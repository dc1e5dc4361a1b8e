"""The float8 products of an 8B step, 8,192 tokens, by how their factors are scaled, on one Hopper.

    python jobs/benchmarks/float8_products.py

Milliseconds of all linears' forward, input's and weight's gradients in 32 layers, by cuBLAS: with
one scale, with a scale per row, and as DeepSeek's (128 x 128 weights, 128 numbers of others).
`fast` adds in the tensor cores' own precision, which blocks do not have. Casts are not included.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from raytrain_adv.ops.float8.cast import E4M3, multiply

TOKENS, LAYERS, CALLS = 8192, 32, 6
LINEARS = [(4096, 4096, 2), (1024, 4096, 2), (14336, 4096, 2), (4096, 14336, 1)]
"""Output and input features, and how many a layer has."""
BF16 = torch.bfloat16


def ones(*shape: int) -> Tensor:
    """Return scales."""
    return torch.ones(shape, device="cuda")


Products = Iterator[tuple[str, Callable[[], Tensor]]]


def forms(left: Tensor, right: Tensor, of_weights: bool) -> Products:
    """Yield the products of left [a, k] and right [b, k] by name; whether `right` are weights."""
    (a, k), b = left.shape, right.shape[0]
    yield "bf16", lambda: left @ right.t()
    left8, right8 = ((100 * x).clamp(-448, 448).to(E4M3) for x in (left, right))
    rows = (ones(a, 1), ones(1, b))
    for fast in (True, False):
        name = ", fast" if fast else ""
        yield f"one scale{name}", partial(multiply, left8, right8, ones(), ones(), BF16, fast)
        yield f"rows{name}", partial(multiply, left8, right8, *rows, BF16, fast)
    groups, blocks = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    scales = (ones(b // 128, k // 128), blocks) if of_weights else (ones(k // 128, b), groups)
    other = (scales[0].t(), scales[1])
    of_left = ones(k // 128, a).t()
    yield (
        "blocks",
        lambda: F.scaled_mm(left8, right8.t(), of_left, groups, *other, output_dtype=BF16),
    )


def milliseconds(call: Callable[[], Tensor]) -> float:
    """Return the mean time of a call on the GPU."""
    for _ in range(2):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / CALLS


def main() -> None:
    """Measure each product, and print the sums."""
    total: defaultdict[str, float] = defaultdict(float)
    for out, inner, number in LINEARS:
        # What is multiplied, of which the last is summed: x and w, gradient and w, gradient and x.
        for a, k, b, of_weights in (
            (TOKENS, inner, out, True),
            (TOKENS, out, inner, True),
            (out, TOKENS, inner, False),
        ):
            left, right = (torch.randn(n, k, device="cuda", dtype=BF16) for n in (a, b))
            for name, call in forms(left, right, of_weights):
                total[name] += LAYERS * number * milliseconds(call)
    for name, ms in total.items():
        print(f"{name:<16} {ms:6.1f} ms")


if __name__ == "__main__":
    main()
