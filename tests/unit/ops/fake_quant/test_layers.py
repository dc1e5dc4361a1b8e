"""Layers that round compute what torchao's do, forward and backward, and keep nothing rounded."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
    quantize_,
)
from torchao.quantization.qat import QATConfig

from raytrain_adv.ops.fake_quant import layers
from raytrain_adv.ops.fake_quant.layers import FLOAT8, FakeQuantizedEmbedding, FakeQuantizedLinear

INTEGERS = [
    ("int8", 32, "int8"),
    ("int4", 32, "int8"),
    ("int4", None, "int8"),
    ("int8", 32, ""),
    ("int4", None, ""),
    ("int3", 32, ""),
    ("int2", 64, ""),
]
FLOATS = [(FLOAT8, None, ""), (FLOAT8, None, FLOAT8)]


def base_config(weight_dtype, group_size, activation_dtype):
    dtype = getattr(torch, weight_dtype)
    granularity = PerGroup(group_size) if group_size else PerAxis(0)
    if activation_dtype:
        return Int8DynamicActivationIntxWeightConfig(
            weight_dtype=dtype, weight_granularity=granularity
        )
    return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)


def passed(linear, x, gradient):
    x = x.clone().requires_grad_()
    output = linear(x)
    output.backward(gradient)
    return [output.detach(), x.grad, linear.weight.grad, linear.bias.grad]


def inputs(dtype, gradient_size=1e-3):
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 64, dtype=dtype)
    x = torch.randn(3, 17, 128, dtype=dtype)
    with torch.no_grad():
        x[0, 0], linear.weight[3] = 0.0, 0.0
    return linear, x, torch.randn(3, 17, 64, dtype=dtype) * gradient_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", INTEGERS)
def test_outputs_and_gradients_are_torchaos_to_the_bit(scheme, dtype):
    linear, x, gradient = inputs(dtype)
    ours = FakeQuantizedLinear.of(copy.deepcopy(linear), *scheme)
    theirs = torch.nn.Sequential(copy.deepcopy(linear))
    quantize_(theirs, QATConfig(base_config(*scheme), step="prepare"))
    expected = passed(theirs[0], x, gradient)
    for own, other in zip(passed(ours, x, gradient), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", INTEGERS)
def test_the_converted_linear_computes_the_same_numbers(scheme, dtype):
    linear, x, _ = inputs(dtype)
    converted = torch.nn.Sequential(copy.deepcopy(linear))
    quantize_(converted, base_config(*scheme))
    ours = FakeQuantizedLinear.of(linear, *scheme)
    assert not torch.equal(ours(x), F.linear(x, linear.weight, linear.bias))
    torch.testing.assert_close(ours(x), converted(x), rtol=0, atol=0)


def test_torchaos_float8_weights_compute_the_same_numbers():
    """Without a bias: torchao adds it to the rounded product, in a step of its own."""
    from torchao.quantization import Float8WeightOnlyConfig

    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 64, bias=False, dtype=torch.bfloat16)
    x = torch.randn(5, 128).bfloat16()
    converted = torch.nn.Sequential(copy.deepcopy(linear))
    quantize_(converted, Float8WeightOnlyConfig())
    ours = FakeQuantizedLinear.of(linear, FLOAT8, None, "")
    torch.testing.assert_close(ours(x), converted(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchaos_float8_products_are_the_same_bits(dtype):
    """The product itself is torchao's, not one of dequantized values: only rounding is trained."""
    from torchao.quantization import Float8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    from raytrain_adv.ops.fake_quant.rounding import EPS
    from raytrain_adv.ops.fake_quant.torchao_config import config_of

    config = config_of(FLOAT8, None, FLOAT8)
    linear, x, _ = inputs(dtype)
    of_activations = QuantizeTensorToFloat8Kwargs(
        torch.float8_e4m3fn, PerRow(), hp_value_lb=EPS, kernel_preference=config.kernel_preference
    )
    weight = Float8Tensor.from_hp(
        linear.weight.detach(),
        hp_value_lb=EPS,
        mm_config=config.mm_config,
        act_quant_kwargs=of_activations,
    )
    ours = FakeQuantizedLinear.of(linear, FLOAT8, None, FLOAT8)
    with torch.no_grad():
        assert torch.equal(ours(x), F.linear(x, weight, linear.bias))


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("scheme", INTEGERS[:-1] + FLOATS)
def test_gradients_point_where_unquantized_ones_do(scheme, size):
    """torchao 0.18's float8 fake quantizers cast gradients to float8 unscaled: cosine near 0."""
    linear, x, gradient = inputs(torch.bfloat16, size)
    ours = FakeQuantizedLinear.of(copy.deepcopy(linear), *scheme)
    plain, rounded = passed(linear, x, gradient), passed(ours, x, gradient)
    for own, other in zip(rounded[1:], plain[1:], strict=True):
        assert torch.isfinite(own).all()
        cosine = F.cosine_similarity(own.double().flatten(), other.double().flatten(), dim=0)
        assert cosine > 0.9


@pytest.mark.parametrize("scheme", [("int4", 32, "int8"), (FLOAT8, None, FLOAT8)])
@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_rounded_is_kept_for_backward(scheme, compiled):
    """What is kept is what a plain linear keeps: the factors as they came."""
    linear, x, gradient = inputs(torch.bfloat16)
    ours = FakeQuantizedLinear.of(linear, *scheme)
    x.requires_grad_()
    held = {x.data_ptr(), linear.weight.data_ptr()}
    call = torch.compile(ours, backend="aot_eager_decomp_partition") if compiled else ours
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = call(x)
    large = [t for t in kept if t.numel() >= linear.weight.numel() // 2]
    assert {t.data_ptr() for t in large} <= held
    output.backward(gradient)
    assert linear.weight.grad.abs().sum() > 0


def test_frozen_weights_get_no_gradient_and_inputs_do():
    linear, x, gradient = inputs(torch.bfloat16)
    ours = FakeQuantizedLinear.of(linear.requires_grad_(False), "int4", 32, "int8")
    x.requires_grad_()
    ours(x).backward(gradient)
    assert ours.weight.grad is None and x.grad.abs().sum() > 0


@pytest.mark.parametrize("rows_at_once", [8192, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_rounds_the_rows_it_looks_up(dtype, rows_at_once, monkeypatch):
    monkeypatch.setattr(layers, "ROWS_AT_ONCE", rows_at_once)
    torch.manual_seed(0)
    table = torch.nn.Embedding(50, 64, padding_idx=0, dtype=dtype)
    ids = torch.tensor([[3, 7, 3, 0], [49, 1, 2, 3]])
    ours = FakeQuantizedEmbedding.of(copy.deepcopy(table), "int4", 32)
    theirs = torch.nn.Sequential(copy.deepcopy(table))
    config = QATConfig(weight_config=_weight_config(), step="prepare")
    quantize_(theirs, config, filter_fn=lambda m, _: isinstance(m, torch.nn.Embedding))
    gradient = torch.randn(2, 4, 64, dtype=dtype)
    for module in (ours, theirs[0]):
        module(ids).backward(gradient)
    torch.testing.assert_close(ours(ids), theirs(ids), rtol=0, atol=0)
    torch.testing.assert_close(ours.weight.grad, theirs[0].weight.grad, rtol=0, atol=0)
    assert ours.weight.grad[0].abs().sum() == 0


def _weight_config():
    from torchao.quantization.qat import IntxFakeQuantizeConfig

    return IntxFakeQuantizeConfig(
        torch.int4, group_size=32, is_symmetric=True, scale_precision=None
    )


def test_switched_off_it_is_the_plain_layer():
    linear, x, gradient = inputs(torch.bfloat16)
    ours = FakeQuantizedLinear.of(copy.deepcopy(linear), "int4", 32, "int8")
    ours.rounds = False
    for own, other in zip(passed(ours, x, gradient), passed(linear, x, gradient), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)


def test_an_output_may_be_changed_in_place():
    """As RoCBert does: of a biased linear's output PyTorch made a view, which autograd refused."""
    linear, x, gradient = inputs(torch.float32)
    ours = FakeQuantizedLinear.of(linear, "int8", None, "none")
    output = ours(x.requires_grad_())
    output += 1.0
    output.backward(gradient)
    assert x.grad is not None
