"""The kernels of fake quantization on a GPU, against torchao's operations."""

import copy

import pytest
import torch

from raytrain_adv.ops.fake_quant.layers import FakeQuantizedEmbedding, FakeQuantizedLinear
from raytrain_adv.ops.fake_quant.rounding import (
    fake_quantize_groups,
    fake_quantize_tokens,
    round_groups,
    round_tokens,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape, group", [((64, 128), 32), ((33, 14336), 14336), ((1024, 4096), 64)]
)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_are_rounded_as_on_the_cpu_where_they_are_converted(shape, group, bits, dtype):
    weight = torch.randn(shape, device="cuda", dtype=dtype)
    weight[0] = 0.0
    rounded, scale = fake_quantize_groups(weight, bits, group)
    expected, expected_scale = round_groups(weight.cpu(), bits, group)
    torch.testing.assert_close(scale.cpu(), expected_scale, rtol=0, atol=0)
    torch.testing.assert_close(rounded.cpu(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 17, 128), (4096, 4096), (257, 14336)])
def test_activations_are_rounded_as_torchaos_tensors_round_them(shape, dtype):
    x = torch.randn(shape, device="cuda", dtype=dtype) * 3 + 0.5
    x[0] = 0.0
    for own, other in zip(fake_quantize_tokens(x), round_tokens(x), strict=True):
        torch.testing.assert_close(own, other.view(own.shape), rtol=0, atol=0)


def test_a_compiled_linear_rounds_as_the_eager_one():
    torch.manual_seed(0)
    linear = torch.nn.Linear(512, 1024, bias=False, device="cuda", dtype=torch.bfloat16)
    eager = FakeQuantizedLinear.of(copy.deepcopy(linear), "int4", 32, "int8")
    other = FakeQuantizedLinear.of(copy.deepcopy(linear), "int4", 32, "int8")
    compiled = torch.compile(other)
    x = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)
    gradient = torch.randn(256, 1024, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(compiled(x), eager(x), rtol=0, atol=0)
    for call in (compiled, eager, linear):
        call(x).backward(gradient)
    # Values on an end of the range are cut by torch's bfloat16 rounding, and not by fused code,
    # which rounds less: its gradient is no further from the unquantized one.
    plain = linear.weight.grad.double().flatten()
    near = [
        torch.nn.functional.cosine_similarity(of.weight.grad.double().flatten(), plain, dim=0)
        for of in (other, eager)
    ]
    assert near[0] > near[1] - 1e-3 and min(near) > 0.98


def test_a_tables_backward_needs_its_gradient_and_little_more():
    """Rounded whole, its scales had cost four times the gradient's bytes at the step's peak."""
    table = torch.nn.Embedding(128256, 1024, device="cuda", dtype=torch.bfloat16)
    ours = FakeQuantizedEmbedding.of(table, "int8", 32)
    ids = torch.randint(128256, (2, 4096), device="cuda")
    rows = ours(ids)
    gradient = torch.randn_like(rows)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rows.backward(gradient)
    size = table.weight.nbytes
    assert torch.cuda.max_memory_allocated() - before < 1.6 * size
    assert ours.weight.grad.nbytes == size
