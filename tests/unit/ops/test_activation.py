"""A forward-only kernel with our gradient computes and learns as torch does."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from raytrain_adv.ops import activation as ops

NAMES = map("test_activation_{}".format, itertools.count())
VALUES = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
}


def unseen(function):
    """Return the function as a kernel for inference computes it: autograd sees nothing."""

    def kernel(x):
        out = torch.empty_like(x)
        with torch.no_grad():
            out.copy_(function(x))
        return out

    return kernel


def fused(function):
    def product(x):
        left, right = (half.contiguous() for half in x.chunk(2, dim=-1))
        return function(left) * right

    def kernel(x):
        with torch.no_grad():
            return product(x).contiguous()

    return kernel


def passed(function, *tensors):
    own = [t.clone().requires_grad_() for t in tensors]
    out = function(*own)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    return [out.detach(), *(t.grad for t in own)]


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_of_a_bare_activation_are_torchs(kind, dtype):
    torch.manual_seed(0)
    x = (4 * torch.randn(3, 5, 32)).to(dtype)
    op = ops.activation(next(NAMES), kind, unseen(VALUES[kind]))
    exact = kind != "gelu_quick"  # torch has no such function, and rounds each part of the formula
    rtol = 0 if exact else 2 * torch.finfo(dtype).eps * 4
    for own, theirs in zip(passed(op, x), passed(VALUES[kind], x), strict=True):
        torch.testing.assert_close(own, theirs, rtol=rtol, atol=0 if exact else rtol)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_fused", [True, False])
def test_value_and_gradients_of_a_gated_activation_are_torchs_to_the_bit(kind, dtype, is_fused):
    torch.manual_seed(0)
    gate, up = (3 * torch.randn(2, 7, 16, dtype=dtype) for _ in range(2))
    kernel = (fused if is_fused else unseen)(VALUES[kind])
    op = ops.gated(next(NAMES), kind, kernel, is_fused)
    expected = passed(lambda g, u: VALUES[kind](g) * u, gate, up)
    for own, theirs in zip(passed(op, gate, up), expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("kind", VALUES)
def test_the_derivative_is_that_of_the_function(kind):
    x = torch.linspace(-6, 6, 60, dtype=torch.float64, requires_grad=True)
    numeric = torch.autograd.functional.jacobian(VALUES[kind], x).diagonal()
    own = ops.ACTIVATIONS[kind].backward(torch.ones_like(x), x.detach())
    torch.testing.assert_close(own.double(), numeric, rtol=1e-5, atol=1e-6)


def test_the_operators_hold_what_torch_asks_of_operators():
    gate, up = (torch.randn(2, 8, 16, requires_grad=True) for _ in range(2))
    product = ops.gated(next(NAMES), "silu", unseen(functional.silu), is_fused=False)
    assert set(torch.library.opcheck(product, (gate, up)).values()) == {"SUCCESS"}
    bare = ops.activation(next(NAMES), "silu", unseen(functional.silu))
    assert set(torch.library.opcheck(bare, (gate,)).values()) == {"SUCCESS"}


def test_only_gate_and_up_are_kept_for_backward():
    kept = []
    gate, up = (torch.randn(4, 16, requires_grad=True) for _ in range(2))
    op = ops.gated(next(NAMES), "silu", unseen(functional.silu), is_fused=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        op(gate, up)
    assert len(kept) == 2
