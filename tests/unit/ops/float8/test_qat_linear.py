"""Rounded factors multiplied in float8: how far from exact, forward, backward and compiled."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torchao.float8 import Float8LinearConfig

from raytrain_adv.ops.fake_quant.layers import FLOAT8, FakeQuantizedLinear
from raytrain_adv.ops.float8.linear import Float8Linear
from raytrain_adv.ops.float8.qat_linear import (
    OWN_ROUNDING,
    ROUNDING,
    Float8FakeQuantizedLinear,
    is_coarse,
)

SCHEMES = [
    ("int4", 32, "int8"),
    ("int4", None, "int8"),
    ("int4", None, ""),
    ("int3", 64, ""),
    ("int2", 32, "int8"),
    ("int8", 32, "int8"),
    (FLOAT8, None, FLOAT8),
]


def passed(linear, x, gradient, call=None):
    """Return output, and gradients of input and parameters."""
    linear.zero_grad()
    x = x.clone().requires_grad_()
    output = linear(x) if call is None else call(x)
    output.backward(gradient)
    return [output.detach(), x.grad, *(p.grad for p in linear.parameters() if p.requires_grad)]


def apart(one, other):
    """Return the norm of the difference as a share of the second's."""
    return float(((one.double() - other.double()).norm() / other.double().norm()).detach())


def cosine(one, other):
    return float(F.cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0))


def inputs(dtype=torch.bfloat16, gradient_size=1e-3, bias=True):
    torch.manual_seed(0)
    linear = torch.nn.Linear(512, 96, bias=bias, dtype=dtype)
    x = torch.randn(2, 64, 512, dtype=dtype)
    with torch.no_grad():
        x[0, 0], linear.weight[3] = 0.0, 0.0
    return linear, x, torch.randn(2, 64, 96, dtype=dtype) * gradient_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_outputs_are_as_exact_as_is_said(scheme, dtype):
    """Weights of one scale per row are exact: only activations are rounded by float8. What would
    drown in float8's rounding is not multiplied in it.
    """
    linear, x, _ = inputs(dtype)
    exact = FakeQuantizedLinear.of(copy.deepcopy(linear), *scheme)
    ours = Float8FakeQuantizedLinear.of(linear, *scheme)
    found, expected = ours(x), exact(x)
    bound = 0.03 if scheme[1] is None else 0.045
    if is_coarse(scheme[0]):
        assert 0.01 < apart(found, expected) < bound
        assert apart(found, expected) < apart(F.linear(x, linear.weight, linear.bias), expected)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [1.0, 1e-6])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_point_where_unquantized_ones_do(scheme, size):
    linear, x, gradient = inputs(gradient_size=size)
    exact = FakeQuantizedLinear.of(copy.deepcopy(linear), *scheme)
    ours = Float8FakeQuantizedLinear.of(copy.deepcopy(linear), *scheme)
    found, expected = passed(ours, x, gradient), passed(exact, x, gradient)
    for own, other, plain in zip(
        found[1:], expected[1:], passed(linear, x, gradient)[1:], strict=True
    ):
        assert torch.isfinite(own).all()
        assert cosine(own, other) > 0.99
        assert cosine(own, plain) > 0.9


def test_the_figures_that_the_plan_states_are_those_of_this_arithmetic():
    """For normally distributed factors; a product's error, as a share of its norm."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(1024, 128, bias=False)
    torch.nn.init.normal_(linear.weight, std=0.02)
    x = torch.randn(64, 1024)
    unrounded = linear(x)
    for name, said in ROUNDING.items():
        exact = FakeQuantizedLinear.of(copy.deepcopy(linear), name, 32, "int8")(x)
        assert apart(exact, unrounded) == pytest.approx(float(said[:-1]) / 100, rel=0.1)
        if is_coarse(name):
            found = Float8FakeQuantizedLinear.of(copy.deepcopy(linear), name, 32, "int8")(x)
            assert apart(found, exact) == pytest.approx(float(OWN_ROUNDING[:-1]) / 100, rel=0.1)


def test_in_evaluation_it_computes_what_is_exported():
    linear, x, _ = inputs()
    exact = FakeQuantizedLinear.of(copy.deepcopy(linear), *SCHEMES[0])
    ours = Float8FakeQuantizedLinear.of(copy.deepcopy(linear), *SCHEMES[0]).eval()
    assert torch.equal(ours(x), exact(x))
    ours.rounds = False
    assert torch.equal(ours(x), linear(x))


def test_off_it_trains_as_the_float8_linear_to_the_bit():
    linear, x, gradient = inputs()
    config = Float8LinearConfig.from_recipe_name("tensorwise")
    float8 = Float8Linear.from_float(copy.deepcopy(linear), config)
    ours = Float8FakeQuantizedLinear.of(linear, *SCHEMES[0])
    ours.rounds = False
    for own, other in zip(passed(ours, x, gradient), passed(float8, x, gradient), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[1], SCHEMES[5]])
def test_compiled_gives_what_eager_gives(scheme):
    torch._dynamo.reset()
    linear, x, gradient = inputs()
    ours = Float8FakeQuantizedLinear.of(linear, *scheme)
    call = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for own, other in zip(passed(ours, x, gradient), passed(ours, x, gradient, call), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[5]])
def test_kept_for_backward_are_the_weight_as_it_came_and_the_input_in_float8(scheme, compiled):
    torch._dynamo.reset()
    linear, x, gradient = inputs(bias=False)
    ours = Float8FakeQuantizedLinear.of(linear, *scheme)
    x.requires_grad_()
    call = torch.compile(ours, backend="aot_eager_decomp_partition") if compiled else ours
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = call(x)
    large = [t for t in kept if t.numel() >= linear.weight.numel() // 4]
    plain = [t for t in large if t.dtype != torch.float8_e4m3fn]
    assert [t.data_ptr() for t in plain] == [linear.weight.data_ptr()]
    assert [t.numel() for t in large if t.dtype == torch.float8_e4m3fn] == [512 * 128]
    output.backward(gradient)
    assert linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[1]])
def test_a_frozen_weight_costs_no_gradient_product(scheme):
    linear, x, gradient = inputs(bias=False)
    ours = Float8FakeQuantizedLinear.of(copy.deepcopy(linear), *scheme)
    expected = passed(ours, x, gradient)
    frozen = Float8FakeQuantizedLinear.of(linear.requires_grad_(False), *scheme)
    with torch.profiler.profile() as seen:
        found = passed(frozen, x, gradient)
    counts = {e.key: e.count for e in seen.key_averages()}
    assert counts["aten::_scaled_mm"] == 2 and "raytrain_adv::cast_both" not in counts
    assert linear.weight.grad is None
    assert torch.equal(found[1], expected[1])
