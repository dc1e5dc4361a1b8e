"""LoRA on stacked experts: PEFT's adapters, multiplied beside the matrices, not added to them.

PEFT's own forward pass adds each adapter's whole product to the matrices of all experts, by a
parametrization that torch.compile does not trace and FSDP2 does not shard. Here tokens pass through
the two factors: the same result, without a second copy of the experts.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from raytrain_adv.dtensor import plain_name
from raytrain_adv.ops.experts.find import layout_of
from raytrain_adv.ops.experts.grouped import Factors, GroupedExperts


class AdaptedExperts(ParamWrapper):
    """The outermost of the nested adapters that PEFT puts on a module's parameters."""

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Return what the experts compute, each adapter beside its matrix."""
        factors: dict[str, Factors] = {}
        layer: Any = self
        while isinstance(layer, ParamWrapper):
            adapter: Any = layer
            factors[layer.parameter_name] = adapter.get_delta_factors(layer.active_adapters[0])
            layer = layer.base_layer
        output: Tensor = layer(*inputs, **named, **factors)
        return output


def adapt(model: nn.Module, fqn: str) -> None:
    """Have PEFT's adapters on a module's stacked experts computed beside their matrices."""
    outer: Any = model.get_submodule(fqn)
    outer.__class__ = AdaptedExperts
    inner = outer
    while isinstance(inner.base_layer, ParamWrapper):
        inner = inner.base_layer
    if not isinstance(inner.base_layer, GroupedExperts) and layout_of(inner.base_layer) is not None:
        inner.base_layer = GroupedExperts.of(inner.base_layer)


def merged_stacks(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Return for each adapted stack of experts, by its plain name, a function that computes it with
    its adapter in it: in float32, as PEFT merges.
    """
    found: dict[str, Callable[[], Tensor]] = {}
    for fqn, module in model.named_modules():
        layer: Any = module if isinstance(module, AdaptedExperts) else None
        while isinstance(layer, ParamWrapper):
            found[plain_name(f"{fqn}.{layer.parameter_name}")] = partial(_merged, layer)
            layer = layer.base_layer
    return found


@torch.no_grad()
def _merged(layer: Any) -> Tensor:
    held = layer.get_param()
    base: Tensor = held if isinstance(held, Tensor) else held.unpacked()
    adapter = layer.active_adapters[0]
    down, up = (layer.get_submodule(f"lora_{part}.{adapter}").weight.float() for part in "AB")
    down = down.reshape(layer.num_experts, -1, down.shape[-1])
    up = up.reshape(up.shape[0], -1, layer.num_experts).permute(2, 0, 1)
    change = up @ down * layer.scaling[adapter]
    whole: Tensor = base.float() + (change if layer._did_swap_in_out_features else change.mT)
    return whole


def inject(model: nn.Module, config: LoraConfig, stacks: list[str], adapter: str) -> None:
    """Let PEFT put adapters on modules, by its config, and on stacked matrices, by their fqns.

    PEFT takes the names of linears inside dense and shared experts (gate_proj) for those of stacked
    experts, which transformers 4 had as linears; such linears are named in `model.peft_config` by
    their weights instead, which PEFT adapts to the same result. Remove when PEFT 0.21's
    convert_peft_config_for_transformers leaves alone names that the model has.
    """
    from peft import inject_adapter_in_model
    from peft.utils import transformers_weight_conversion as conversion

    names = list(config.target_modules or [])
    config.target_parameters = sorted(stacks) or None
    given = copy.deepcopy(config)
    taken = [name for name in names if taken_for_experts(name, model)]
    with patch.object(conversion, "convert_peft_config_for_transformers", lambda *_, **__: None):
        inject_adapter_in_model(config, model, adapter)
    given.target_modules = [name for name in names if name not in taken]
    weights = [f"{name}.weight" for name in taken]
    given.target_parameters = sorted([*weights, *_short(stacks, model)]) or None
    if given.target_parameters:
        given.lora_dropout = 0.0  # PEFT refuses another one beside names of weights
    described: Any = model
    described.peft_config[adapter] = given


def taken_for_experts(name: str, model: nn.Module) -> bool:
    """Whether PEFT would adapt stacked experts for this name of a linear."""
    from peft.utils import transformers_weight_conversion as conversion

    alone: Any = LoraConfig(target_modules=[name])
    try:
        conversion.convert_peft_config_for_transformers(alone, model=model, conversions=None)
    except ValueError:  # it wants gate_proj and up_proj together
        return True
    return list(alone.target_modules or []) != [name]


def _short(stacks: list[str], model: nn.Module) -> list[str]:
    """Return the last two segments of parameters' names if those match nothing else."""
    ends = {".".join(name.split(".")[-2:]) for name in stacks}
    named = {plain_name(fqn) for fqn, _ in model.named_parameters()}
    matched = {fqn for fqn in named if ".".join(fqn.split(".")[-2:]) in ends}
    return sorted(ends if matched == set(stacks) else stacks)
