from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MixtralConfig

from raytrain_adv.estimate.flops import layer_configs, mean_keys, training_flops_per_token
from tests.families import tiny_model

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def layer_matrices(mlps: int = 1) -> int:
    return 64 * 64 * 2 + 64 * 32 * 2 + mlps * 3 * 64 * 160


ATTENTION = 6 * 3 * 64 * 512


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_counts_its_matrices_and_its_head_but_not_the_embedding(tied: bool) -> None:
    model = on_meta(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    expected = 6 * (3 * layer_matrices() + 64 * 100) + ATTENTION
    assert training_flops_per_token(model, 512) == expected


def test_frozen_matrices_need_no_weight_gradient() -> None:
    model = on_meta(LlamaConfig(**SIZES, tie_word_embeddings=False)).requires_grad_(False)
    expected = 4 * (3 * layer_matrices() + 64 * 100) + ATTENTION
    assert training_flops_per_token(model, 512) == expected


def test_of_a_mixture_only_the_active_experts_count() -> None:
    config = MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2)
    router = 3 * 64 * 8
    expected = 6 * (3 * layer_matrices(mlps=2) + router + 64 * 100) + ATTENTION
    assert training_flops_per_token(on_meta(config), 512) == expected


def test_a_sliding_window_shortens_attention() -> None:
    config = AutoConfig.for_model("mistral", **SIZES, sliding_window=128)
    without = AutoConfig.for_model("mistral", **SIZES, sliding_window=None)
    saved = training_flops_per_token(on_meta(without), 512) - training_flops_per_token(
        on_meta(config), 512
    )
    assert saved == pytest.approx(12 * 3 * 64 * (256 - mean_keys(512, 128)))


def test_mean_keys_are_those_of_a_causal_mask() -> None:
    seq_len, window = 400, 64
    counted = sum(min(position + 1, window) for position in range(seq_len)) / seq_len
    assert mean_keys(seq_len, window) == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("kind", ["gemma4_text", "mamba2", "rwkv"])
def test_layers_that_differ_or_have_no_attention_have_flops(kind):
    model = tiny_model(kind)
    rest = training_flops_per_token(model, 0.0001)
    attended = training_flops_per_token(model, 16) - rest
    configs = layer_configs(model.config)
    sizes = [getattr(c, "num_attention_heads", 0) * getattr(c, "head_dim", 0) for c in configs]
    assert attended == pytest.approx(0 if kind != "gemma4_text" else 12 * sum(sizes) * 8, rel=1e-3)
