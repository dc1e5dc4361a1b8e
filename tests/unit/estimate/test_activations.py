"""The rule for eager layers compared with what autograd keeps, on CPU."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from raytrain_adv.estimate.activations import read_layer
from raytrain_adv.estimate.flops import text_config
from raytrain_adv.model.build import decoder_layers

BATCH, TIME = 2, 128
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "use_cache": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "mistral": {},
    "phi3": {"pad_token_id": 0},
    "mixtral": {"num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 64,
        "head_dim": 32,
    },
}


def model_of(kind: str, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **SIZES, **KINDS[kind])
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=attention
    )
    return model.train()


def kept_by_autograd(model: PreTrainedModel) -> int:
    """Return the bytes that the forward pass up to the head keeps, without parameters."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = tensor
        return tensor

    tokens = torch.randint(0, SIZES["vocab_size"], (BATCH, TIME))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.get_decoder()(input_ids=tokens, use_cache=False)
    assert output.last_hidden_state.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def kept_by_rule(model: PreTrainedModel, dtype: torch.dtype, attention: str) -> float:
    kind: Any = "eager" if attention == "eager" else "fused"
    layers = [read_layer(layer, text_config(model)) for _, layer in decoder_layers(model)]
    final_norm = (4 + dtype.itemsize) * SIZES["hidden_size"]
    per_token = sum(x.kept_eager(dtype.itemsize, kind, TIME) for x in layers) + final_norm
    return per_token * BATCH * TIME


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_rule_is_within_ten_percent_of_autograd(
    kind: str, dtype: torch.dtype, attention: str
) -> None:
    model = model_of(kind, dtype, attention)
    rule = kept_by_rule(model, dtype, attention)
    assert rule == pytest.approx(kept_by_autograd(model), rel=0.1)


def test_a_compiled_layer_keeps_less_than_an_eager_one() -> None:
    layer = decoder_layers(model_of("llama", torch.bfloat16, "sdpa"))[0][1]
    read = read_layer(layer, AutoConfig.for_model("llama", **SIZES))
    eager = read.kept_eager(2, "fused", TIME)
    assert read.kept_selective(2, True) < read.kept_compiled(2, "fused", TIME) < eager
