"""The Triton kernels of the worked example, by Triton's interpreter: no GPU needed."""

from __future__ import annotations

from pathlib import Path

from tests.processes import interpreted

EXAMPLE = Path(__file__).parents[3] / "jobs" / "kernels" / "llama_layers" / "torch-cuda"
PROGRAM = """
import sys
import torch
from torch.nn import functional
sys.path.insert(0, sys.argv[1])
import kernels  # the example's file, not the package

torch.manual_seed(0)
rows, features, block = 37, 40, 256
x, gate, up, gradient = (torch.randn(rows, features) for _ in range(4))
weight = torch.randn(features)


def same(name, own, theirs):
    torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)
    print("SAME", name)


def passed(function, *tensors):
    own = [t.clone().requires_grad_() for t in tensors]
    out = function(*own)
    out.backward(gradient)
    return out.detach(), *(t.grad for t in own)


out, of_gate, of_up = (torch.empty_like(x) for _ in range(3))
grid = (-(-out.numel() // block),)
kernels.swiglu_forward[grid](gate, up, out, out.numel(), BLOCK=block)
kernels.swiglu_backward[grid](gradient, gate, up, of_gate, of_up, out.numel(), BLOCK=block)
expected = passed(lambda a, b: functional.silu(a) * b, gate, up)
same("swiglu", (out, of_gate, of_up), expected)

inverse, of_x, of_weight = torch.empty(rows), torch.empty_like(x), torch.empty(5, features)
kernels.rms_norm_forward[(rows,)](x, weight, out, inverse, features, 1e-5, BLOCK=64)
kernels.rms_norm_backward[(5,)](
    gradient, x, weight, inverse, of_x, of_weight, rows, features, BLOCK=64
)
expected = passed(lambda a, w: functional.rms_norm(a, (features,), w, 1e-5), x, weight)
same("rms_norm", (out, of_x, of_weight.sum(0)), expected)
"""


def test_the_triton_kernels_compute_and_derive_as_torch_does() -> None:
    found = interpreted(PROGRAM, str(EXAMPLE))
    assert found.split() == ["SAME", "swiglu", "SAME", "rms_norm"]
