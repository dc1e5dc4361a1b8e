"""The linear with scales by row, against torchao's own."""

import pytest
import torch
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear as TorchaoFloat8Linear

from raytrain_adv.ops.float8 import row_cast
from raytrain_adv.ops.float8.row_linear import RowwiseLinear

CONFIG = Float8LinearConfig.from_recipe_name("rowwise")


def plain(bias: bool = False, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(48, 32, bias=bias, dtype=dtype)


def passed(linear, x, gradient):
    """Return output, and gradients of input and trained parameters."""
    linear.zero_grad()
    x = x.clone().requires_grad_()
    output = linear(x)
    output.backward(gradient)
    trained = [p for p in linear.parameters() if p.requires_grad]
    return [output.detach(), x.grad, *(p.grad.clone() for p in trained)]


def inputs(*shape: int, dtype: torch.dtype = torch.bfloat16, size: float = 1.0):
    return [(torch.randn(*shape, n) * size).to(dtype) for n in (48, 32)]


@pytest.mark.parametrize("has_rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(16,), (2, 16)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_output_and_gradients_are_torchaos_to_the_bit(
    monkeypatch, has_rows, dtype, bias, shape, size
):
    """Whether the product takes the scales of rows, or they are multiplied by afterwards."""
    monkeypatch.setattr(row_cast, "_has_rows", lambda tensor: has_rows)
    given = inputs(*shape, dtype=dtype, size=size)
    theirs = passed(TorchaoFloat8Linear.from_float(plain(bias, dtype), CONFIG), *given)
    ours = passed(RowwiseLinear.from_float(plain(bias, dtype)), *given)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)


def test_zeros_go_in_and_out_as_zeros():
    given = [torch.zeros_like(t) for t in inputs(16)]
    assert not any(t.any() for t in passed(RowwiseLinear.from_float(plain()), *given))


def test_a_frozen_weight_gets_no_gradient_and_costs_no_product():
    linear, given = RowwiseLinear.from_float(plain()), inputs(16)
    output, grad_x, _ = passed(linear, *given)
    linear.weight.requires_grad_(False)
    with torch.profiler.profile() as seen:
        frozen = passed(linear, *given)
    calls = sum(e.count for e in seen.key_averages() if e.key == "aten::_scaled_mm")
    assert len(frozen) == calls == 2
    assert torch.equal(frozen[0], output) and torch.equal(frozen[1], grad_x)


def test_compiled_gives_what_eager_gives():
    linear, (x, gradient) = RowwiseLinear.from_float(plain(True)), inputs(2, 16)
    eager = passed(linear, x, gradient)
    linear.compile(fullgraph=True, backend="aot_eager")
    for one, other in zip(eager, passed(linear, x, gradient), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0)
