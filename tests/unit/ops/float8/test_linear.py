"""The float8 linear against torchao's own; torch._scaled_mm computes for real on a CPU too."""

import pytest
import torch
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear as TorchaoFloat8Linear

from raytrain_adv.ops.float8.cast import (
    cast,
    cast_both,
    cast_transposed,
    tensorwise_scale,
    transposed,
)
from raytrain_adv.ops.float8.linear import Float8Linear

CONFIG = Float8LinearConfig.from_recipe_name("tensorwise")


def pair(in_features: int = 48, out_features: int = 32, bias: bool = False):
    """Return torchao's and our float8 form of one bf16 linear."""
    torch.manual_seed(0)
    first = torch.nn.Linear(in_features, out_features, bias=bias, dtype=torch.bfloat16)
    second = torch.nn.Linear(in_features, out_features, bias=bias, dtype=torch.bfloat16)
    second.load_state_dict(first.state_dict())
    return TorchaoFloat8Linear.from_float(first, CONFIG), Float8Linear.from_float(second, CONFIG)


def passed(linear, x, gradient):
    """Return output, and gradients of input and parameters."""
    x = x.clone().requires_grad_()
    output = linear(x)
    output.backward(gradient)
    return [output.detach(), x.grad, *(p.grad for p in linear.parameters())]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(16, 48), (2, 16, 48)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_output_and_gradients_are_torchaos_to_the_bit(bias, shape, size):
    torchao, ours = pair(bias=bias)
    x = torch.randn(shape, dtype=torch.bfloat16) * size
    gradient = torch.randn((*shape[:-1], 32), dtype=torch.bfloat16) * size
    for theirs, own in zip(passed(torchao, x, gradient), passed(ours, x, gradient), strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=0)


def test_zeros_go_in_and_out_as_zeros():
    _, ours = pair()
    x, gradient = torch.zeros(16, 48).bfloat16(), torch.zeros(16, 32).bfloat16()
    assert all(torch.equal(t, torch.zeros_like(t)) for t in passed(ours, x, gradient))


def test_a_frozen_weight_gets_no_gradient_and_costs_no_product():
    torchao, ours = pair()
    ours.weight.requires_grad_(False)
    x, gradient = torch.randn(16, 48).bfloat16(), torch.randn(16, 32).bfloat16()
    with torch.profiler.profile() as seen:
        _, x_grad, weight_grad = passed(ours, x, gradient)
    calls = sum(e.count for e in seen.key_averages() if e.key == "aten::_scaled_mm")
    assert weight_grad is None
    assert calls == 2
    torch.testing.assert_close(x_grad, passed(torchao, x, gradient)[1], rtol=0, atol=0)


def test_compiled_gives_what_eager_gives():
    _, ours = pair()
    x, gradient = torch.randn(16, 48).bfloat16(), torch.randn(16, 32).bfloat16()
    eager = passed(ours, x, gradient)
    ours.zero_grad()
    compiled = passed(torch.compile(ours, fullgraph=True, backend="aot_eager"), x, gradient)
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_casts_agree_and_bring_overflow_to_the_ends(dtype):
    tensor = torch.randn(32, 48).bfloat16()
    scale = tensorwise_scale(tensor, dtype) * 4  # a fixed scale that is too large for some
    plain, turned = cast_both(tensor, scale, dtype)
    assert torch.equal(plain.float(), cast(tensor, scale, dtype).float())
    assert torch.equal(turned.float(), plain.t().float())
    assert torch.equal(transposed(plain, scale).float(), turned.float())
    assert torch.equal(cast_transposed(tensor, scale, dtype, scale).float(), turned.float())
    assert turned.is_contiguous() and transposed(plain, scale).is_contiguous()
    assert plain.float().abs().max() == torch.finfo(dtype).max


def test_the_custom_operators_keep_torchs_rules():
    tensor = torch.randn(16, 32).bfloat16()
    scale = tensorwise_scale(tensor, torch.float8_e4m3fn)
    torch.library.opcheck(cast_both, (tensor, scale, torch.float8_e4m3fn))
    torch.library.opcheck(cast_transposed, (tensor, scale, torch.float8_e4m3fn, scale))
    # The other checks compare the inputs before and after, which torch cannot for float8.
    checks = ("test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        transposed, (cast(tensor, scale, torch.float8_e4m3fn), scale), test_utils=checks
    )
