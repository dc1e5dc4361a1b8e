"""A linear stored in float8 computes what Float8Linear does with the same weight."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torchao.float8 import Float8LinearConfig

from raytrain_adv.ops.bitsandbytes.quantize import Form
from raytrain_adv.ops.float8.linear import Float8Linear
from raytrain_adv.ops.float8.stored_linear import StoredFloat8Linear, tried
from tests.ranks import run_ranks

CPU = torch.device("cpu")
ROWS, COLUMNS, TOKENS = 80, 192, 16
BF16 = torch.bfloat16


def plain_linear():
    torch.manual_seed(0)
    linear = nn.Linear(COLUMNS, ROWS, dtype=BF16)
    with torch.no_grad():
        linear.weight[70, 7] = 4.0  # on the last of four ranks: the scale is the whole weight's
    return linear.requires_grad_(False)


def stored(linear):
    layer = StoredFloat8Linear.of(linear, Form("fp8"))
    layer.take(linear.weight.detach(), CPU)
    return layer


def numbers():
    torch.manual_seed(1)
    return torch.randn(2, TOKENS, COLUMNS, dtype=BF16), torch.randn(2, TOKENS, ROWS, dtype=BF16)


def results(layer):
    x, pull = numbers()
    x.requires_grad_()
    value = layer(x)
    return value.detach(), *torch.autograd.grad(value, x, pull)


@pytest.mark.parametrize("backend", [None, "aot_eager_decomp_partition", "inductor"])
def test_values_and_gradients_are_those_of_a_frozen_float8_linear_bit_for_bit(backend):
    linear = plain_linear()
    layer = stored(linear)
    config = Float8LinearConfig.from_recipe_name("tensorwise")
    expected = results(Float8Linear.from_float(linear, config))
    if backend:
        torch._dynamo.reset()
        layer.compile(backend=backend, fullgraph=True)
    for found, wanted in zip(results(layer), expected, strict=True):
        assert torch.equal(found, wanted)


def test_evaluation_multiplies_the_values_by_unrounded_inputs():
    layer = stored(plain_linear()).eval()
    x, _ = numbers()
    assert torch.equal(layer(x), nn.functional.linear(x, layer.unpacked(), layer.bias))


def sharded():
    linear = plain_linear()
    layer = StoredFloat8Linear.of(linear, Form("fp8"))
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("shard",))
    fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=BF16))
    layer.take(linear.weight.detach()[layer.region], CPU)
    return *results(layer), layer.unpacked()


def test_four_ranks_compute_what_one_does(tmp_path):
    whole = stored(plain_linear())
    expected = (*results(whole), whole.unpacked())
    for answer in run_ranks(sharded, 4, tmp_path):
        for found, wanted in zip(answer, expected, strict=True):
            assert torch.equal(found, wanted)


def test_a_product_that_rounding_does_not_explain_is_named(monkeypatch):
    sizes = [(64, 48), (80, 192)]
    wrong, (value, gradient) = tried(sizes, CPU, BF16, 0.1)
    assert not wrong and 0.02 < value < 0.05 and 0.02 < gradient < 0.1
    forward = StoredFloat8Linear.forward
    monkeypatch.setattr(StoredFloat8Linear, "forward", lambda self, x: forward(self, x) * 1.2)
    wrong, _ = tried(sizes, CPU, BF16, 0.1)
    assert [text.partition(":")[0] for text in wrong] == ["48 x 64", "192 x 80"]
