"""Tiny checkpoints of real architectures, written as transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from raytrain_adv.config import JobConfig, load

# 90 rows and 3 experts do not divide by 4 ranks: some shards are uneven, some empty.
SIZES: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "mistral": {},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "phi3": {"pad_token_id": 0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "mixtral": {"num_local_experts": 3},
    "qwen3_moe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 16,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "moe_layers": [0, 1],
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gemma4_text": {
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
        "enable_moe_block": True,
        "head_dim": 8,
        "vocab_size_per_layer_input": 90,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen3_5_text": {
        "head_dim": 8,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "recurrent_gemma": {},
}


def write_checkpoint(kind: str, folder: Path, **changed: Any) -> Path:
    """Write a tiny checkpoint of one of KINDS in bfloat16, with no weight left at a round value."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.partition("-")[0], **{**SIZES, **KINDS[kind], **changed})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def job_for(model: Path | str, folder: Path, **keys: Any) -> JobConfig:
    """Return a job that trains all of a model's weights, with these keys changed."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "model_name_or_path": str(model),
        "finetuning_type": "full",
        "dataset": "none.json",
        "output_dir": str(folder / "out"),
        **keys,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    return load(path)
