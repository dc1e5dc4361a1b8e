"""Tiny checkpoints of multimodal models whose text part can be trained on text alone."""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from transformers import AutoModelForMultimodalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from tests.families import HIDDEN, SIZES, randomize, tiny_keys

TOWER: tuple[tuple[str, int], ...] = (
    (r"(\w+_)?(output|input|projector|projection|mm|proj)_(dim|dims|hidden_size)", HIDDEN),
    (r"(out|text)_hidden_size|hidden_dim", HIDDEN),
    (r"depth|(\w+_)?(num_(hidden_)?(layers|blocks)|n_layers)", 2),
    (r"(\w+_)?(num_heads|encoder_attention_heads)", 4),
    (r"image_size", 56),
    (r"patch_size", 14),
    (r"(num_)?position_embedding(s|_size)", 64),
)
"""Pattern of a config key of a part beside the text's -> its value in the tiny model."""
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SECTIONS: dict[str, list[int]] = {
    kind: [4, 2, 2]
    for kind in (
        "cosmos3_edge",
        "qwen2_5_omni_thinker",
        "qwen2_vl",
        "qwen2_5_vl",
        "paddleocr_vl",
        "glm46v",
        "glm4v",
        "glm_ocr",
        "glmga",
    )
} | {"ernie4_5_vl_moe": [3, 3, 2], "glm4v_moe": [2, 1, 1], "hunyuan_vl": [2, 2, 2, 2]}
"""Model type -> sections of its rotary tables, which follow from the size of a head."""
HEADS = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"]},
        "vision_config": {
            "sam_config": {**HEADS, "mlp_dim": 32, "global_attn_indexes": [1]},
            "encoder_config": {**HEADS, "num_key_value_heads": 2, "intermediate_size": 32},
        },
    },
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "moe_intermediate_size": 32, "top_k_experts": 2}
    },
    "dots3_note": {
        "vision_config": {
            "adapter_in_dim": HIDDEN,
            "adapter_out_dim": HIDDEN,
            "mlp_layer_types": ["dense", "sparse"],
        },
        "audio_config": {"adapter_input_size": HIDDEN, "adapter_output_size": HIDDEN},
    },
    "emu3": {"": {"vocabulary_map": {"<|extra_200|>": 250, "<image>": 251}}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": HIDDEN // 4}},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0}},
    "granite4_vision": {"": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "1/2"}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "muse_spark": {
        "vision_config": {"num_hidden_layers": 4},
        "audio_config": {"num_hidden_layers": 4, "out_hidden_size": HIDDEN},
    },
    "nemo_speechlm": {
        "audio_config": {
            "asr_config": {**HEADS, "intermediate_size": 32},
            "diarization_config": {
                "audio_config": {**HEADS, "intermediate_size": 32},
                "head_config": {"audio_hidden_size": HIDDEN},
                "chunk_left_context": 50,
                "chunk_right_context": 50,
            },
        },
        "word_timestamp_config": {"blank_token_id": 0, "num_key_value_heads": 4},
    },
    "perception_lm": {
        "vision_config": {
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": {"embed_dim": HIDDEN, "img_size": [14, 14], "depth": 2, "num_heads": 4},
        }
    },
    "qwen2_5_omni_thinker": {"": {"vision_start_token_id": 249}},
    "qwen3_omni_moe_thinker": {"": {"vision_start_token_id": 249}},
    "step3p7": {"text_config": {"sliding_window": 16}},
}
"""Model type -> part, empty for the whole -> keys whose values their names do not tell."""
CHOSEN = {"deepstack_visual_indexes": [0], "fullatt_block_indexes": [1]}
MARK = re.compile(r"\w*(image|video|audio|vision|boi|eoi|boa|eoa)\w*_(id|index)")


def multimodal_families() -> list[str]:
    """Return the multimodal model types of transformers' own list that have a text decoder."""
    return sorted(filter(has_text, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES))


def has_text(kind: str) -> bool:
    """Whether a model type has a decoder of text, and other parts, and is no classifier of images
    (ShieldGemma 2: its head is made of two rows of the decoder's).
    """
    if kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return False
    if kind not in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES or kind not in CONFIG_MAPPING:
        return False
    config = CONFIG_MAPPING[kind]
    return not config.is_encoder_decoder and {"text_config"} < config.sub_configs.keys()


def tower_keys(given: PretrainedConfig) -> dict[str, Any]:
    """Return the keys that make a part beside the text tiny."""
    keys: dict[str, Any] = {}
    for name, value in given.to_dict().items():
        if name in CHOSEN:
            keys[name] = CHOSEN[name]
        elif isinstance(value, int) and not isinstance(value, bool):
            sizes = (size for pattern, size in (*TOWER, *SIZES) if re.fullmatch(pattern, name))
            keys[name] = next(sizes, value)
    return keys


def tiny_multimodal(kind: str) -> PreTrainedModel:
    """Return a tiny multimodal model with random weights."""
    torch.manual_seed(0)
    given = CONFIG_MAPPING[kind]()
    keys: dict[str, Any] = {}
    for name in given.sub_configs:
        part = getattr(given, name)
        if isinstance(part, PretrainedConfig):
            text = name == "text_config"
            sizes = tiny_keys(part, part.model_type) if text else tower_keys(part)
            if text and kind in SECTIONS:
                sizes["rope_parameters"] = {**ROPE, "mrope_section": SECTIONS[kind]}
            keys[name] = type(part)(**{**sizes, **PARTS.get(kind, {}).get(name, {})})
    marks = 250  # ids that no letter has
    for name, value in given.to_dict().items():
        if isinstance(value, int) and MARK.fullmatch(name):
            keys[name], marks = marks, marks + 1
        elif name in ("projection_dim", "hidden_size"):
            keys[name] = HIDDEN
    keys |= PARTS.get(kind, {}).get("", {})
    auto = cast(Any, AutoModelForMultimodalLM)
    return randomize(auto.from_config(type(given)(**keys), dtype=torch.float32))
