"""Rounding as engines do it: formulas written out, compressed-tensors' functions, gradients."""

import pytest
import torch
import torch.nn.functional as F

from raytrain_adv.ops.fake_quant.engine_rounding import (
    fake_quantize_float8_blocks,
    fake_quantize_inputs_of_experts,
    fake_quantize_rows,
    fake_quantize_tokens_in_float32,
    int8_product,
    quantize_float4,
    quantize_float8_blocks,
    quantize_tokens,
)
from raytrain_adv.ops.fake_quant.layers import FakeQuantizedLinear
from raytrain_adv.ops.fake_quant.rounding import LEAST_SCALE, fake_quantize_groups
from raytrain_adv.ops.fake_quant.targets import (
    FLOAT8_BLOCKS,
    FLOAT8_GROUPS,
    INT8_IN_FLOAT32,
    MXFP4,
    NVFP4,
    Q4_0,
)


def sample(rows=48, columns=96):
    torch.manual_seed(0)
    x = torch.randn(rows, columns) * torch.rand(rows, 1) * 3
    x[:, 7] *= 20
    return x.bfloat16()


@pytest.mark.parametrize("with_bias", [False, True])
def test_int8_products_are_summed_in_integers_and_scaled_once(with_bias):
    x, weight = sample(), sample(64) / 50
    bias = torch.randn(64).bfloat16() if with_bias else None
    low, high = x.float().amin(1, keepdim=True), x.float().amax(1, keepdim=True)
    scale = (high - low) / 255
    zero = torch.round(-128 - low / scale)
    integers = (torch.round(x.float() / scale) + zero).clamp(-128, 127)
    of_weight = (weight.float().abs().amax(1, keepdim=True) / 127.5).bfloat16().float()
    rounded = torch.round(weight.float() / of_weight).clamp(-128, 127)
    sums = (integers - zero).double() @ rounded.double().t()
    wanted = sums.float() * scale * of_weight.t()
    if bias is not None:
        wanted += bias.float()
    assert torch.equal(int8_product(x, weight, bias), wanted.bfloat16())


def test_a_token_of_equal_values_keeps_its_size():
    x = torch.zeros(2, 32)
    integers, scale, zero = quantize_tokens(x)
    assert torch.equal((integers - zero) * scale, x)
    assert fake_quantize_tokens_in_float32(x).isfinite().all()


def test_inputs_of_experts_are_symmetric_integers_with_one_scale_per_token():
    x = sample()
    x[3] = 0
    amax = x.double().abs().amax(1, keepdim=True).clamp(min=1e-10)
    integers = torch.round(x.double() * (127 / amax))
    assert integers.abs().max() == 127 and integers.min() < -100
    found = fake_quantize_inputs_of_experts(x)
    torch.testing.assert_close(found.double(), integers * amax / 127, rtol=2**-8, atol=0)
    assert not found[3].any()


@pytest.mark.parametrize("form", [NVFP4, MXFP4])
def test_float4_values_are_the_nearest_and_ties_go_to_the_even_code(form):
    values, scale = quantize_float4(sample(), form)
    grid = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert torch.isin(values.float().abs(), grid).all()
    size = {NVFP4: 16, MXFP4: 32}[form]
    exact = sample().float().unflatten(1, (-1, size)) / scale.unsqueeze(-1)
    nearest = (exact.abs().clamp(max=6).unsqueeze(-1) - grid).abs().amin(-1)
    found = (exact.clamp(-6, 6) - values.float().unflatten(1, (-1, size))).abs()
    assert torch.allclose(found, nearest, atol=1e-6)
    row = torch.zeros(1, 32)
    row[0, :8] = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    ties, one = quantize_float4(row, MXFP4)
    assert one[0, 0] == 1
    assert ties[0, :8].tolist() == [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]


@pytest.mark.parametrize("form", [NVFP4, MXFP4])
def test_float4_is_compressed_tensors_rounding(form):
    pytest.importorskip("compressed_tensors", reason="it is part of the extra dev")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = sample().float() / 100
    keys = {"num_bits": 4, "type": "float", "symmetric": True}
    if form == MXFP4:
        args = QuantizationArgs(
            **keys, strategy="group", group_size=32, scale_dtype=torch.uint8, zp_dtype=torch.uint8
        )
        whole = None
    else:
        args = QuantizationArgs(
            **keys, strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
        )
        whole = torch.tensor([512.0])
    groups = weight.unflatten(1, (-1, args.group_size))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=whole)
    wanted = quantize(weight, scale, zero, args, global_scale=whole)
    values, own = quantize_float4(weight, form)
    assert torch.equal(own, scale / whole if whole is not None else scale)
    assert torch.equal(values, wanted)


def test_scales_of_ggufs_blocks_are_exact_in_float16():
    weight = sample() * torch.logspace(-7, 0, 48).unsqueeze(1)
    _, plain = fake_quantize_groups(weight.bfloat16(), 4, 32)
    rounded, scale = fake_quantize_groups(weight.bfloat16(), 4, 32, None, LEAST_SCALE[Q4_0])
    assert not torch.equal(plain.half().bfloat16(), plain)
    assert torch.equal(scale.half().bfloat16(), scale)
    integers = rounded.float().unflatten(1, (-1, 32)) / scale.float().unsqueeze(-1)
    assert (integers - integers.round()).abs().max() < 0.03  # products are rounded to bfloat16
    assert integers.abs().max() <= 8


@pytest.mark.parametrize("form", [INT8_IN_FLOAT32, NVFP4, MXFP4, Q4_0])
def test_gradients_are_those_of_the_rounded_product(form):
    activation = INT8_IN_FLOAT32 if form == INT8_IN_FLOAT32 else ""
    linear = torch.nn.Linear(96, 64, dtype=torch.bfloat16)
    ours = FakeQuantizedLinear.of(linear, form, 32, activation)
    x = sample().requires_grad_()
    output = ours(x)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    if form == INT8_IN_FLOAT32:
        rounded = fake_quantize_rows(linear.weight.detach())
        rounded_x = fake_quantize_tokens_in_float32(x.detach())
        assert torch.equal(linear.weight.grad, gradient.t() @ rounded_x)
        assert torch.equal(x.grad, gradient @ rounded)
    with torch.no_grad():
        plain = F.linear(x, linear.weight, linear.bias)
    assert 0 < (output - plain).norm() / plain.norm() < 0.2
    assert (linear.weight.grad - gradient.t() @ x.detach()).norm() < 0.2 * linear.weight.grad.norm()


def test_float8_blocks_are_what_compressed_tensors_rounds():
    pytest.importorskip("compressed_tensors", reason="it is part of the extra dev")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize

    weight = sample(256, 384)
    values, scale = quantize_float8_blocks(weight)
    assert scale.shape == (2, 3)
    largest = weight.float().view(2, 128, 3, 128).abs().amax((1, 3))
    assert torch.equal(scale, (largest / 448).bfloat16().float())
    how = QuantizationArgs(type="float", strategy="block", block_structure=[128, 128])
    theirs = quantize(weight.float(), scale, torch.zeros_like(scale), how)
    assert torch.equal(values.float(), theirs.float())
    linear = FakeQuantizedLinear.of(
        torch.nn.Linear(384, 256, bias=False), FLOAT8_BLOCKS, None, FLOAT8_GROUPS
    )
    linear.weight.data = weight.float()
    x = sample(4, 384).float().requires_grad_()
    groups = x.detach().view(4, 3, 128)
    of_groups = groups.abs().amax(-1, keepdim=True) / 448
    rounded = (groups / of_groups).to(torch.float8_e4m3fn).float() * of_groups
    wanted = F.linear(rounded.flatten(1), fake_quantize_float8_blocks(weight.float()))
    output = linear(x)
    assert torch.equal(output, wanted)
    output.sum().backward()
    assert x.grad is not None and linear.weight.grad is not None
    assert torch.equal(linear.weight.grad, rounded.flatten(1).sum(0).expand(256, -1))
