"""What compiled layers keep, counted on the meta device, compared with Inductor's partitioner."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from raytrain_adv.estimate.counted import kept_by_layers
from raytrain_adv.model.build import decoder_layers
from tests.families import cut_config
from tests.saved import Saved

TIME = 256


@torch.library.custom_op("tests::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return zeros in the shapes of a fused kernel's result and log-sum-exp."""
    shape = (*query.shape[:-1], value.shape[-1])
    return query.new_zeros(shape), torch.zeros(query.shape[:-1])


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*query.shape[:-1], value.shape[-1])
    return query.new_empty(shape), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("tests::attention_backward", mutates_args=())
def backward(gradient: Tensor, kept: list[Tensor]) -> list[Tensor]:
    """Return zeros in the shapes of its inputs."""
    return [torch.zeros_like(x) for x in kept[:3]]


@backward.register_fake
def _(gradient: Tensor, kept: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x) for x in kept[:3]]


attention.register_autograd(
    lambda ctx, gradient, _: tuple(backward(gradient, list(ctx.saved_tensors))),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


def fused(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
    result: Tensor = attention(query, key, value)[0]
    return result


KINDS = (
    "deepseek_v3",
    "gemma3_text",
    "glm4_moe",
    "glm_moe_dsa",
    "gpt_oss",
    "granitemoe",
    "llama",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "zaya",
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_count_of_a_compiled_layer_is_within_ten_percent_of_the_partitioners(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "scaled_dot_product_attention", fused)
    torch._dynamo.reset()
    model = AutoModelForCausalLM.from_config(cut_config(kind), dtype=torch.bfloat16).train()
    saved = Saved(model)
    for _, layer in decoder_layers(model):
        layer.compile(backend="aot_eager_decomp_partition")
        compiled: Any = layer._compiled_call_impl

        def call(*args: Any, compiled: Any = compiled, **kwargs: Any) -> Any:
            saved.inside.append(args[0])
            result = compiled(*args, **kwargs)
            saved.inside.clear()
            return result

        layer._compiled_call_impl = call
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        model(input_ids=torch.randint(3, 200, (1, TIME)), use_cache=False)
    monkeypatch.undo()
    with torch.device("meta"):
        planned = AutoModelForCausalLM.from_config(cut_config(kind), dtype=torch.bfloat16).train()
    layers = kept_by_layers(planned, torch.bfloat16, False, TIME)
    assert layers is not None
    assert sum(x.compiled for x in layers) * TIME == pytest.approx(saved.num_bytes, rel=0.1)
