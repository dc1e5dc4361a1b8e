"""Liger's layers as operators: what torch.compile is told of them is so. Their kernels need a GPU,
in whose place PyTorch computes here; tests/gpu/test_liger_on_gpu.py runs them.
"""

import pytest
import torch
from torch.nn import functional

pytest.importorskip("liger_kernel", reason="liger-kernel is an extra, for Linux alone")

from liger_kernel.ops import layer_norm as their_layer_norm
from liger_kernel.ops import rms_norm as their_rms_norm
from liger_kernel.ops import swiglu as their_swiglu

from raytrain_adv.ops import liger_layers
from raytrain_adv.ops.liger_layers import RMSNormFunction, layer_norm, silu_mul


def norm_of(x, weight, eps, offset):
    inverse = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    normal = (x * inverse).to(x.dtype)
    return (normal if weight is None else normal * (offset + weight)).to(x.dtype)


@pytest.fixture(autouse=True)
def in_torch(monkeypatch):
    """Liger's launches, as it calls them, computed by PyTorch."""

    def forward(x, weight, eps, offset, cast, rows):
        rstd = torch.full((x.numel() // x.shape[-1],), eps)
        return norm_of(x, weight, eps, offset), x, rstd, 0, 0, cast

    def backward(dy, x, weight, rstd, offset, cast, block, warps, in_place, rows, trains):
        assert not in_place
        rows, dy_rows = x.float(), dy.reshape(x.shape).float()
        inverse = torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + float(rstd[0]))
        scaled = dy_rows if weight is None else dy_rows * (offset + weight)
        dx = inverse * (scaled - rows * inverse**2 * (scaled * rows).mean(-1, keepdim=True))
        dw = None
        if weight is not None and trains:
            dw = (dy_rows * rows * inverse).sum(0).to(weight.dtype)
        return dx.to(x.dtype).reshape(dy.shape), dw

    def layer_forward(x, weight, bias, eps):
        one = torch.full((x.numel() // x.shape[-1],), eps)
        return functional.layer_norm(x, x.shape[-1:], weight, bias, eps), x, one, one + 0, 0, 0

    def layer_backward(dy, x, weight, bias, mean, rstd):
        _, means, inverses = torch.native_layer_norm(x, x.shape[-1:], weight, bias, float(mean[0]))
        dx, dw, db = torch.ops.aten.native_layer_norm_backward(
            dy.reshape(x.shape), x, x.shape[-1:], means, inverses, weight, bias, [True] * 3
        )
        return dx.reshape(dy.shape), dw, db

    def swiglu_forward(a, b, multiplier):
        return a, b, functional.silu(multiplier * a) * b

    def swiglu_backward(a, b, dc, multiplier):
        da = torch.ops.aten.silu_backward(dc * b, multiplier * a) * multiplier
        db = dc * functional.silu(multiplier * a)
        return a.copy_(da), b.copy_(db)  # over what it is given

    monkeypatch.setattr(their_rms_norm, "rms_norm_forward", forward)
    monkeypatch.setattr(their_rms_norm, "rms_norm_backward", backward)
    monkeypatch.setattr(their_layer_norm, "layer_norm_forward", layer_forward)
    monkeypatch.setattr(their_layer_norm, "layer_norm_backward", layer_backward)
    monkeypatch.setattr(their_swiglu, "swiglu_forward", swiglu_forward)
    monkeypatch.setattr(their_swiglu, "swiglu_backward", swiglu_backward)


CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


@pytest.mark.parametrize("weight", ["trained", "frozen", "none"])
def test_the_norms_operator_computes_what_it_declares(weight):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 8).transpose(1, 2).requires_grad_()  # as queries are normed
    given = None if weight == "none" else torch.randn(8, requires_grad=weight == "trained")
    arguments = (x, given, 1e-6, 0.0, "llama", False)
    torch.library.opcheck(liger_layers._rms_norm, arguments, test_utils=CHECKS)


def test_the_other_operators_are_what_they_say():
    torch.manual_seed(0)
    x, gate, up = (torch.randn(2, 5, 8, requires_grad=True) for _ in range(3))
    weight, bias = torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)
    torch.library.opcheck(liger_layers._layer_norm, (x, weight, bias, 1e-5), test_utils=CHECKS)
    torch.library.opcheck(liger_layers._silu_mul, (gate, up, 1.5), test_utils=CHECKS)


def test_compiled_they_compute_as_torch_and_leave_what_they_are_given():
    torch.manual_seed(0)
    x, gate, up = (torch.randn(4, 8, requires_grad=True) for _ in range(3))
    weight = torch.randn(8, requires_grad=True)

    def ours(x, gate, up, weight):
        normal = RMSNormFunction.apply(x, weight, 1e-6, 1.0, "gemma", True, None)
        gated = silu_mul(gate * 1.0, up * 1.0, 1.5, 2.0)
        return normal + gated + layer_norm(x, weight, None, 1e-5)

    def plain(x, gate, up, weight):
        gated = functional.silu(1.5 * gate) * up * 2.0
        last = functional.layer_norm(x, (8,), weight, None, 1e-5)
        return norm_of(x, weight, 1e-6, 1.0) + gated + last

    inputs = (x, gate, up, weight)
    before = [t.detach().clone() for t in inputs]
    out = torch.compile(ours, backend="aot_eager", fullgraph=True)(*inputs)
    expected = plain(*inputs)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
    )
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
