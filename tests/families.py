"""Tiny checkpoints of every causal language model that the installed transformers has.

Sizes follow from the names of a config's keys, so that the families of the next release are made by
themselves; KEYS has what the names do not tell.
"""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

HIDDEN = 64
VOCABULARY = 264
SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size(_per_layer_input)?|n_vocab", VOCABULARY),
    (r"hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|lru_width|word_embed_proj_dim", 64),
    (r"hidden_size_per_layer_input", 16),
    (r"(.*_)?intermediate_size(_mlp)?|ffn_dim|n_inner|ffn_hidden_size|d_ff|dim_ff", 32),
    (r"mamba_intermediate_size|mamba_d_ssm", 128),
    (r"num_hidden_layers|n_layers?|num_layers", 2),
    (r"(\w+_)?(num_attention_heads|n_heads?|num_heads)", 4),
    (r"(\w+_)?(num_key_value_heads|num_kv_heads)", 2),
    (r"num_global_key_value_heads", 2),
    (r"(attention_|kv_channels|swa_|global_|index_)*(head_dim|kv_channels)", 16),
    (r"n_routed_experts|num_experts|num_local_experts|moe_num_experts|n_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|moe_top_k|num_selected_experts", 2),
    (r"n_group|topk_group|n_shared_experts", 1),
    (r"first_k_dense_replace", 1),
    (r"(\w+_)?lora_rank", 16),
    (r"qk_rope_head_dim|qk_nope_head_dim", 8),
    (r"v_head_dim|qk_head_dim|index_n_heads", 16),
    (r"linear_num_value_heads", 4),
    (r"linear_num_key_heads", 2),
    (r"linear_(key|value)_head_dim", 16),
    (r"mamba_d_state|state_size|ssm_state_size|mamba_state_dim", 16),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r"mamba_n_groups|n_groups|mamba_ngroups", 1),
    (r"(mamba_)?chunk_size", 16),
    (r"mamba_dt_rank|time_step_rank", 8),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|seq_length", 256),
    (r"(\w+_)?sliding_window(_size)?|attention_window_size|window_size", 16),
    (r"num_kv_shared_layers", 0),
    (r"laurel_rank|rotary_dim", 8),
)
"""Pattern of a config key -> its value in the tiny model."""
UNSET = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "qk_rope_head_dim")
"""Keys that are set though they are None by default."""
INDEXERS = 64
"""Heads that choose which tokens are attended to, as many as the real models have. Each has a ReLU:
if all of a few are zero, scores are equal, and topk's choice differs with the padded length."""
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16}
KEYS: dict[str, dict[str, Any]] = {
    "axk2": {"index_n_heads": INDEXERS, "index_topk": 8, "index_head_dim": 16},
    "bailing_hybrid": {
        "num_expert_group": 2,
        "topk_group": 1,
        "layer_group_size": 2,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
    },
    "bamba": {**MAMBA2, "attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": MROPE, "full_attention": None},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v32": {"index_n_heads": INDEXERS, "index_topk": 8, "index_head_dim": 16},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "index_n_heads": INDEXERS,
    },
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "glm_moe_dsa": {"index_n_heads": INDEXERS, "index_topk": 8, "index_head_dim": 16},
    "granitemoehybrid": {
        **MAMBA2,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "position_embedding_type": "rope",
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "full_attention"],
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
    },
    "longcat_flash": {"zero_expert_num": 2, "expert_ffn_hidden_size": 32},
    "mamba2": {"num_heads": 16, "head_dim": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 2,
        "ple_embed_dim": 16,
        "hc_lowrank": 8,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,  # these allow one length only
        "attn_layers": ["local", "local"],  # the others hash at random
    },
    "trocr": {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 32},
    "xlm": {"causal": True, "emb_dim": 64},
    "xlnet": {"d_inner": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "num_key_value_heads": 4,
        "n_mamba_heads": 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""Model type -> keys whose values its names do not tell."""
OTHERS = re.compile("vision|audio|image|vq|encoder|patcher|mimi|text_config")


def families() -> list[str]:
    """Return the model types of transformers' own list that are trained on text alone: neither
    multimodal nor encoder-decoders.
    """
    return sorted(kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if is_text(kind))


def is_text(kind: str) -> bool:
    """Whether a model type is neither multimodal nor an encoder-decoder."""
    config = CONFIG_MAPPING[kind]
    parts = " ".join(config.sub_configs)
    return not (config.is_encoder_decoder or OTHERS.search(parts))


def tiny_config(kind: str) -> PretrainedConfig:
    """Return the config of a tiny model of a type, with a layer of each kind that it has."""
    given = CONFIG_MAPPING[kind]()
    return type(given)(**tiny_keys(given, kind))


def tiny_keys(given: PretrainedConfig, kind: str) -> dict[str, Any]:
    """Return the keys that make a default config of a text model tiny."""
    keys: dict[str, Any] = {}
    latent = hasattr(given, "qk_rope_head_dim")
    for name, value in given.to_dict().items():
        if latent and name == "head_dim":
            keys[name] = 8
            continue
        if latent and name == "num_key_value_heads":
            keys[name] = 4
            continue
        if isinstance(value, bool) or not (isinstance(value, int) or name in UNSET):
            continue
        found = next((n for pattern, n in SIZES if re.fullmatch(pattern, name)), None)
        if found is not None:
            keys[name] = found
        elif re.fullmatch(r"(pad|eos|bos|sep|unk)_token_id", name):
            keys[name] = min(value or 0, 2)
    if "is_decoder" in given.to_dict():
        keys["is_decoder"] = True  # encoders would see the tokens that they are to predict
    layers = [k for k, v in given.to_dict().items() if is_layer_list(k, v)]
    kinds = [list(dict.fromkeys(map(str, getattr(given, k)))) for k in layers]
    count = max([2, *(len(k) for k in kinds)])
    if "num_hidden_layers" in KEYS.get(kind, {}):
        count = KEYS[kind]["num_hidden_layers"]
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if name in keys:
            keys[name] = count
    for key, distinct in zip(layers, kinds, strict=True):
        keys[key] = (distinct * count)[:count]
    return {**keys, **KEYS.get(kind, {})}


WIDTHS = re.compile(
    r"hidden_size|d_model|n_embd|(.*_)?intermediate_size(_mlp)?|ffn_(dim|hidden_size)"
    r"|(\w+_)?lora_rank|mamba_d_ssm"
)
HEADS = re.compile(r"(\w+_)?(num_)?\w*(attention|key_value|value|key|kv|n|num)_heads?")
HEAD_WIDTHS = re.compile(r"(\w+_)?head_dim|kv_channels|mamba_d_(head|state)")
ACTIVE = re.compile(r"num_experts_per_tok(en)?|moe_(topk|k|top_k)|top_k_experts|n_shared_experts")
EXPERTS = re.compile(r"n_routed_experts|num_experts|num_local_experts|moe_num_experts|n_experts")
LONG = re.compile(r"(\w+_)?sliding_window(_size)?|max_position_embeddings")
UNCUT = ("dots3_note_text", "granitemoehybrid", "qwen4_exp_text")
"""Model types whose configs refuse such values."""


def cut_config(kind: str) -> PretrainedConfig:
    """Return the config of a small model of a type, with about the proportions of its default."""
    given = CONFIG_MAPPING[kind]()
    keys = tiny_keys(given, kind)
    numbers = {k: v for k, v in given.to_dict().items() if type(v) is int}
    for name, value in numbers.items() if kind not in UNCUT else ():
        if name in KEYS.get(kind, {}):
            continue
        if WIDTHS.fullmatch(name):
            keys[name] = max(value // 256 * 16, 16)
        elif HEAD_WIDTHS.fullmatch(name):
            keys[name] = max(value // 32 * 8, 8)
        elif HEADS.fullmatch(name):
            keys[name] = max(value // 4, 1)
        elif ACTIVE.fullmatch(name):
            keys[name] = value
        elif EXPERTS.fullmatch(name):
            keys[name] = min(value, 16)
        elif LONG.fullmatch(name):
            keys[name] = 4096
    return type(given)(**keys)


def is_layer_list(key: str, value: Any) -> bool:
    """Whether a key lists a kind for each layer."""
    return (
        isinstance(value, list)
        and len(value) > 1
        and bool(re.search("layer|block", key))
        and all(isinstance(v, str) for v in value)
    )


def tiny_model(kind: str, dtype: torch.dtype = torch.float32, **keys: Any) -> PreTrainedModel:
    """Return a tiny model with random weights, none of them at a round value; `keys` are of its
    config.
    """
    torch.manual_seed(0)
    config, auto = tiny_config(kind), cast(Any, AutoModelForCausalLM)
    config.update(keys)
    return randomize(auto.from_config(config, dtype=dtype))


def randomize(model: PreTrainedModel) -> PreTrainedModel:
    """Move every parameter off the round value it may have."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model
