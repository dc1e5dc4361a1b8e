"""Tiny multimodal checkpoints, with the names of today's class or those of the published files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

TOKENIZER = Path(__file__).parent.parent / "jobs" / "models" / "tiny-llama"
TEXT: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
QWEN: dict[str, Any] = {
    "depth": 2,
    "embed_dim": 32,
    "hidden_size": 32,
    "num_heads": 4,
    "intermediate_size": 32,
    "out_hidden_size": 32,
    "mlp_ratio": 1,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0],
    "patch_size": 14,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
MIXED = (
    {"layer_types": ["linear_attention", "full_attention"]}
    | {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")}
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, str]]] = {
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {},
        VISION,
        {"lm_head.": "language_model.lm_head.", "model.language_model.": "language_model.model."}
        | {"model.vision_tower.": "vision_tower.vision_model."}
        | {"model.multi_modal_projector.": "multi_modal_projector."},
    ),
    "llama4": (
        "Llama4ForConditionalGeneration",
        {"num_local_experts": 4, "intermediate_size_mlp": 48, "moe_layers": [1]}
        | {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
        VISION | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        {},
    ),
    "mistral3": ("Mistral3ForConditionalGeneration", {}, VISION, {}),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {"rope_parameters": ROPE},
        QWEN,
        {"model.language_model.": "model.", "model.visual.": "visual."},
    ),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", {"rope_parameters": ROPE}, QWEN, {}),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", {"rope_parameters": ROPE}, QWEN, {}),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", MIXED, QWEN, {}),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration", MIXED | EXPERTS, QWEN, {}),
}
"""Model type -> class, keys of its text and vision configs, and how its published files name it."""


def write_multimodal(kind: str, folder: Path, **changed: Any) -> Path:
    """Write a tiny multimodal checkpoint in bfloat16, with a tokenizer and a processor's config."""
    torch.manual_seed(0)
    name, text, vision, published = FAMILIES[kind]
    config = AutoConfig.for_model(kind)
    for part, values in (("text_config", TEXT | text | changed), ("vision_config", vision)):
        kept = getattr(config, part)
        given = {k: v for k, v in kept.to_dict().items() if k not in ("layer_types", "model_type")}
        setattr(config, part, type(kept)(**{**given, **values}))
    kind_of_model = getattr(transformers, name)
    model = kind_of_model(kind_of_model.config_class(**config.to_dict())).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    held = load_file(folder / "model.safetensors")
    for new, old in published.items():
        held = {old + n.removeprefix(new) if n.startswith(new) else n: t for n, t in held.items()}
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    for file in TOKENIZER.iterdir():
        if file.name.startswith("tokenizer") or file.suffix == ".jinja":
            shutil.copyfile(file, folder / file.name)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "X"}))
    return folder
