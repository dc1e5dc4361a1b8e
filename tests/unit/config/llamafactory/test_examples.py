"""Each SFT example of LLaMA-Factory, by its keys: it loads, or one message names every key that
cannot be honored.

Source: the YAML files under examples/ of LLaMA-Factory at ff6d4d1 (0.9.6.dev0). The values that
decide nothing (names of models and folders) are ours.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from raytrain_adv.config import load
from raytrain_adv.config.job import section_types
from raytrain_adv.config.schema import schema
from raytrain_adv.errors import JobError

COMMON: dict[str, Any] = {
    "model_name_or_path": "org/model",
    "stage": "sft",
    "do_train": True,
    "dataset": "first,second",
    "cutoff_len": 2048,
    "max_samples": 1000,
    "preprocessing_num_workers": 16,
    "dataloader_num_workers": 4,
    "output_dir": "saves/run",
    "logging_steps": 10,
    "save_steps": 500,
    "plot_loss": True,
    "overwrite_output_dir": True,
    "save_only_model": False,
    "report_to": "none",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1.0e-4,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "ddp_timeout": 180000000,
    "resume_from_checkpoint": None,
}
LORA = COMMON | {
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "trust_remote_code": True,
}
FULL = COMMON | {"finetuning_type": "full", "trust_remote_code": True}
PURE = {key: value for key, value in FULL.items() if key not in ("bf16", "ddp_timeout")} | {
    "pure_bf16": True
}
OFT = COMMON | {"finetuning_type": "oft", "oft_block_size": 32, "oft_target": "all"}
FP8 = {key: value for key, value in FULL.items() if key != "report_to"} | {
    "overwrite_cache": True,
    "report_to": "wandb",
    "run_name": "fp8",
    "fp8": True,
    "fp8_backend": "torchao",
}
PIXELS = {"image_max_pixels": 262144, "video_max_pixels": 16384}
KT = {
    "use_kt": True,
    "kt_cpu_activation": "retain",
    "kt_config": {"kt_backend": "AMXBF16", "kt_num_threads": 96},
    "disable_gradient_checkpointing": False,
}
MEGATRON = {
    "tensor_model_parallel_size": 1,
    "sequence_parallel": False,
    "pipeline_model_parallel_size": 4,
    "bias_activation_fusion": True,
    "apply_rope_fusion": True,
    "use_distributed_optimizer": True,
    "overlap_param_gather": True,
    "overlap_grad_reduce": True,
    "moe_grouped_gemm": True,
    "moe_token_dispatcher_type": "alltoall",
    "expert_model_parallel_size": 2,
    "recompute_granularity": "full",
}
MEGATRON_BRIDGE = {
    "max_steps": 1000,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "sequence_parallel": False,
    "use_distributed_optimizer": True,
    "overlap_param_gather": True,
    "overlap_grad_reduce": True,
    "mixed_precision": "bf16_mixed",
    "use_packed_sequences": False,
    "export_hf_on_finish": False,
}
V1: dict[str, Any] = {
    "model": "org/model",
    "model_class": "llm",
    "kernel_config": {"name": "auto"},
    "quant_config": None,
    "dist_config": {"name": "fsdp2", "dcp_path": None},
    "train_dataset": "rows.yaml",
    "output_dir": "outputs/run",
    "micro_batch_size": 1,
    "cutoff_len": 2048,
    "learning_rate": 1.0e-4,
    "max_steps": 10,
    "sample_backend": "hf",
    "max_new_tokens": 128,
}
V1_REFUSED = [
    "model",
    "kernel_config",
    "dist_config",
    "train_dataset",
    "micro_batch_size",
    "max_new_tokens",
]

EXAMPLES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "train_lora/qwen3_lora_sft": (LORA | {"template": "qwen3_nothink"}, []),
    "train_lora/qwen3_lora_sft_ds3": (
        LORA | {"deepspeed": "examples/deepspeed/ds_z3_config.json"},
        ["deepspeed"],
    ),
    "train_lora/qwen3_lora_sft_ray": (
        LORA | {"dataset_dir": "REMOTE:org/data", "ray_num_workers": 4},
        ["dataset_dir"],
    ),
    "train_lora/qwen3_preprocess": (
        {k: v for k, v in LORA.items() if k not in ("bf16", "learning_rate", "report_to")}
        | {"tokenized_path": "saves/tokens"},
        [],
    ),
    "train_lora/qwen3vl_lora_sft": (
        LORA | PIXELS | {"template": "qwen3_vl_nothink"},
        PIXELS,
    ),
    "train_lora/mossvl_lora_sft": (
        LORA | PIXELS | {"video_fps": 1.0, "video_maxlen": 256, "template": "moss_vl"},
        [*PIXELS, "video_fps", "video_maxlen", "template"],
    ),
    "train_full/qwen3_full_sft": (
        FULL | {"deepspeed": "examples/deepspeed/ds_z3_config.json", "template": "qwen3_nothink"},
        ["deepspeed"],
    ),
    "train_full/qwen3vl_full_sft": (
        FULL
        | PIXELS
        | {
            "freeze_vision_tower": True,
            "freeze_multi_modal_projector": True,
            "freeze_language_model": False,
            "deepspeed": "examples/deepspeed/ds_z3_config.json",
            "template": "qwen3_vl_nothink",
        },
        [*PIXELS, "deepspeed"],
    ),
    "train_qlora/llama3_lora_sft_aqlm": (LORA | {"template": "llama3"}, []),
    "train_qlora/qwen3_lora_sft_bnb_npu": (
        LORA | {"quantization_bit": 4, "quantization_method": "bnb", "double_quantization": False},
        ["quantization_bit", "double_quantization"],
    ),
    "train_qlora/qwen3_lora_sft_otfq": (
        LORA | {"quantization_bit": 4, "quantization_method": "bnb"},
        ["quantization_bit"],
    ),
    "extras/adam_mini": (FULL | {"use_adam_mini": True}, ["use_adam_mini"]),
    "extras/apollo": (
        PURE
        | {
            "use_apollo": True,
            "apollo_layerwise": True,
            "apollo_target": "all",
            "apollo_rank": 128,
            "apollo_scale": 32.0,
            "apollo_scale_type": "channel",
        },
        ["use_apollo", "apollo_layerwise", "apollo_rank"],
    ),
    "extras/asft": (
        FULL | {"deepspeed": "z0.json", "use_asft_loss": True, "asft_alpha": 0.05},
        ["deepspeed", "use_asft_loss", "asft_alpha"],
    ),
    "extras/badam": (
        PURE
        | {
            "use_badam": True,
            "badam_mode": "layer",
            "badam_switch_mode": "ascending",
            "badam_switch_interval": 50,
            "badam_verbose": 2,
        },
        ["use_badam", "badam_verbose"],
    ),
    "extras/dft": (FULL | {"use_dft_loss": True}, ["use_dft_loss"]),
    "extras/eaft": (FULL | {"use_eaft_loss": True, "eaft_alpha": 1.0}, ["use_eaft_loss"]),
    "extras/fp8/deepspeed": (
        FP8 | {"fp8_enable_fsdp_float8_all_gather": False, "deepspeed": "z3_fp8.json"},
        ["fp8", "deepspeed"],
    ),
    "extras/fp8/fsdp": (
        FP8
        | {
            "fp8_enable_fsdp_float8_all_gather": True,
            "fsdp": ["full_shard", "auto_wrap"],
            "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        },
        ["fp8", "fp8_enable_fsdp_float8_all_gather"],
    ),
    "extras/fsdp_qlora": (LORA | {"quantization_bit": 4}, ["quantization_bit"]),
    "extras/galore": (
        PURE
        | {
            "use_galore": True,
            "galore_layerwise": True,
            "galore_target": "all",
            "galore_rank": 128,
            "galore_scale": 2.0,
        },
        ["use_galore", "galore_layerwise", "galore_rank"],
    ),
    "extras/llama_pro": (
        COMMON
        | {
            "finetuning_type": "freeze",
            "freeze_trainable_layers": 8,
            "freeze_trainable_modules": "all",
            "use_llama_pro": True,
        },
        ["finetuning_type", "freeze_trainable_layers", "use_llama_pro"],
    ),
    "extras/loraplus": (LORA | {"loraplus_lr_ratio": 16.0}, ["loraplus_lr_ratio"]),
    "extras/mod": (
        PURE | {"mixture_of_depths": "convert", "optim": "paged_adamw_8bit"},
        ["mixture_of_depths", "optim"],
    ),
    "extras/muon": (FULL | {"use_muon": True}, ["use_muon"]),
    "extras/nlg_eval": (
        {k: v for k, v in LORA.items() if k not in ("do_train", "dataset")}
        | {
            "adapter_name_or_path": "saves/adapter",
            "do_predict": True,
            "eval_dataset": "first",
            "per_device_eval_batch_size": 1,
            "predict_with_generate": True,
        },
        ["dataset", "adapter_name_or_path", "do_predict", "predict_with_generate"],
    ),
    "extras/oft": (OFT, ["finetuning_type"]),
    "extras/qoft": (
        OFT | {"quantization_bit": 4, "double_quantization": False},
        ["finetuning_type", "quantization_bit", "double_quantization"],
    ),
    "extras/pissa": (
        LORA | {"pissa_init": True, "pissa_iter": 16, "pissa_convert": True},
        ["pissa_init", "pissa_convert"],
    ),
    "ascend/qwen3_full_sft_fsdp2": (
        FULL | {"flash_attn": "fa2", "use_v1_kernels": True, "template": "qwen3"},
        ["use_v1_kernels"],
    ),
    "ktransformers/deepseek": (
        LORA | KT | {"template": "deepseek3"},
        ["use_kt", "kt_cpu_activation", "kt_config"],
    ),
    "megatron/qwen3_moe_full": (
        FULL | MEGATRON | {"lr_scheduler_type": "constant", "warmup_ratio": None},
        [
            "pipeline_model_parallel_size",
            "bias_activation_fusion",
            "apply_rope_fusion",
            "moe_grouped_gemm",
            "moe_token_dispatcher_type",
            "expert_model_parallel_size",
            "recompute_granularity",
        ],
    ),
    "megatron_bridge/llama3_sft": (
        {k: v for k, v in LORA.items() if k != "warmup_ratio"}
        | MEGATRON_BRIDGE
        | {"warmup_steps": 10},
        [],
    ),
    "v1/train_full/fsdp2": (V1, V1_REFUSED),
    "v1/train_full/muon": (
        V1 | {"optim_config": {"name": "muon", "wd": 0.1}},
        [*V1_REFUSED, "optim_config"],
    ),
    "v1/train_full/ulysses_cp": (
        V1 | {"flash_attn": "flash_attention_2", "cp_mode": "ulysses", "cp_size": 2},
        [*V1_REFUSED, "cp_size"],
    ),
    "v1/train_full/expert_parallel": (
        V1 | {"init_config": {"name": "init_on_meta"}, "cp_size": 1},
        [*V1_REFUSED, "init_config"],
    ),
    "v1/train_lora": (
        V1 | {"peft_config": {"name": "lora", "r": 16, "target_modules": "all"}},
        [*V1_REFUSED, "peft_config"],
    ),
    "v1/train_qlora": (
        V1 | {"quant_config": {"name": "bnb", "quantization_bit": 4}},
        [*V1_REFUSED, "quant_config"],
    ),
    "v1/train_batching_strategy": (
        V1 | {"batching_strategy": "padding_free"},
        [*V1_REFUSED, "batching_strategy"],
    ),
}


FEATURES = {"fp8", "fp8_enable_fsdp_float8_all_gather", "quantization_bit", "double_quantization"}
"""Keys that a transform takes over once there is one."""
OWNED = {key for kind in section_types() for key in kind.model_fields}


def answer(folder: Path, keys: dict[str, Any]) -> str:
    """Return the refusal, or nothing for keys that load."""
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(keys, sort_keys=False))
    try:
        load(path)
    except JobError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("keys", "refused"), EXAMPLES.values(), ids=EXAMPLES)
def test_an_example_loads_or_names_each_key_that_cannot_be_honored(
    tmp_path: Path, keys: dict[str, Any], refused: list[str]
) -> None:
    refused = [key for key in refused if key not in FEATURES & OWNED]
    found, _, fix = answer(tmp_path, keys).partition("  fix:")
    assert set(re.findall(r"(?:line \d+: |  found: )(?!line)(\w+): ", found)) == set(refused)
    assert all(key in fix for key in refused)


@pytest.mark.parametrize("name", [name for name, (_, refused) in EXAMPLES.items() if not refused])
def test_an_example_that_loads_fits_the_schema(name: str) -> None:
    if not name.startswith("megatron"):  # accepted at their defaults, and not offered by editors
        jsonschema.validate(EXAMPLES[name][0], schema(), jsonschema.Draft202012Validator)


def test_no_remedy_names_a_key_that_is_refused_itself(tmp_path: Path) -> None:
    for name, (keys, refused) in EXAMPLES.items():
        fix = answer(tmp_path, keys).partition("  fix:")[2]
        meant = re.findall(r"did you mean (\w+)\?", fix)
        assert not set(meant) & set(refused), name


@pytest.mark.parametrize("key", ["context_parallel_siz", "deepspead", "xz_config", "task_kind"])
def test_an_unknown_key_is_not_answered_with_a_distant_guess(tmp_path: Path, key: str) -> None:
    text = answer(tmp_path, LORA | {key: 1})
    near = re.findall(r"did you mean (\w+)\?", text)
    assert near in ([], ["context_parallel_size"], ["deepspeed"])


@pytest.mark.parametrize(
    ("key", "ours"),
    [("base_model", "model_name_or_path"), ("lora_r", "lora_rank"), ("sequence_len", "cutoff_len")],
)
def test_another_trainers_key_is_answered_with_its_name_here(
    tmp_path: Path, key: str, ours: str
) -> None:
    assert f"{key}: did you mean {ours}?" in answer(tmp_path, LORA | {key: 1})


def test_a_key_under_another_name_is_not_missing_too(tmp_path: Path) -> None:
    keys = {k: v for k, v in LORA.items() if k != "model_name_or_path"} | {"model": "org/model"}
    assert "(1 problem)" in answer(tmp_path, keys)


def test_evaluation_without_rows_is_refused(tmp_path: Path) -> None:
    assert "do_eval: true: there are no rows" in answer(tmp_path, LORA | {"do_eval": True})
    assert not answer(tmp_path, LORA | {"do_eval": True, "val_size": 0.1})
    assert not answer(tmp_path, LORA | {"do_eval": False})


def test_fp16_next_to_bf16_reports_which_of_them_to_keep(tmp_path: Path) -> None:
    assert "fp16: delete it, and set bf16: true" in answer(tmp_path, LORA | {"fp16": True})
