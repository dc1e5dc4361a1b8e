"""A base and its adapter, rounded as one weight, are the linear that is exported."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.func import functional_call

from raytrain_adv.ops.fake_quant.layers import FakeQuantizedLinear
from raytrain_adv.ops.fake_quant.merged import FakeQuantizedMergedLinear, Merging, merged_weight

SCHEMES = [("int4", 32, ""), ("int8", None, "int8"), ("int8 float32", None, "int8 float32")]


def adapted(scheme: tuple[str, int | None, str], dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48, dtype=dtype))
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["0"], init_lora_weights=False)
    inject_adapter_in_model(config, model)
    layer: Any = model[0]
    for part in (layer.lora_A, layer.lora_B):
        part["default"].to(dtype)
    layer.base_layer.weight.requires_grad_(False)
    layer.base_layer = FakeQuantizedMergedLinear.of(layer.base_layer, *scheme)
    layer.base_layer.join(layer)
    return model


def factors(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    down, up = (getattr(layer, f"lora_{part}")["default"].weight for part in "AB")
    return layer.base_layer.weight, down, up


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_computes_and_learns_as_the_merged_weight_does(scheme):
    model = adapted(scheme, torch.float32)
    weight, down, up = factors(model[0])
    whole = nn.Linear(64, 48)
    whole.weight = nn.Parameter(merged_weight(weight, down, up, 3.0).detach())
    whole.bias = model[0].base_layer.bias
    exported = FakeQuantizedLinear.of(whole, *scheme)
    x = torch.randn(2, 7, 64, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    found, wanted = model(x), exported(other)
    assert torch.equal(found, wanted)
    gradient = torch.randn_like(found)
    found.backward(gradient)
    wanted.backward(gradient)
    assert torch.equal(x.grad, other.grad)
    of_whole = whole.weight.grad
    torch.testing.assert_close(down.grad, 3.0 * up.t() @ of_whole)
    torch.testing.assert_close(up.grad, 3.0 * of_whole @ down.t())


def test_without_rounding_it_is_pefts_own_layer():
    model = adapted(("int4", 32, ""), torch.float32)
    layer, x = model[0], torch.randn(3, 64)
    layer.base_layer.rounds = False
    found = model(x)
    plain = nn.Linear(64, 48)
    plain.weight, plain.bias = layer.base_layer.weight, layer.base_layer.bias
    layer.base_layer, layer.merged_adapters = plain, []
    torch.testing.assert_close(found, model(x), rtol=0, atol=0)


@pytest.mark.parametrize("rounds", [True, False])
def test_it_computes_with_the_tensors_that_mixed_precision_puts_in(rounds):
    """Which are no nn.Parameters, as copies of master weights in bfloat16 are not."""
    model = adapted(("int4", 32, ""), torch.float32)
    model[0].base_layer.rounds = rounds
    cast = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    found = functional_call(model, cast, (x,))
    torch.testing.assert_close(found, model.bfloat16()(x), rtol=0, atol=0)


def test_an_adapter_that_rounding_removes_is_named():
    model = adapted(("int4", 32, ""), torch.bfloat16)
    with torch.no_grad():
        factors(model[0])[2].mul_(1e-6)
    merging = Merging(model, lambda tensor: tensor.detach(), torch.bfloat16)
    assert [*merging.bases] == ["0.weight"]
    merging.weight("0.weight")
    assert "changes 0.0%" in merging.describe() and "removes it wholly from 0.weight" in (
        merging.describe()
    )
