"""LLaMA-Factory's job files run, or stop with one message."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytrain_adv.config import load
from raytrain_adv.config.job import section_types
from raytrain_adv.config.llamafactory import translate
from raytrain_adv.errors import JobError

FULL = {
    "model_name_or_path": "org/model",
    "trust_remote_code": True,
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "full",
    "dataset": "first,second",
    "template": "qwen3_nothink",
    "cutoff_len": 2048,
    "max_samples": 1000,
    "preprocessing_num_workers": 16,
    "dataloader_num_workers": 4,
    "output_dir": "saves/full",
    "logging_steps": 10,
    "save_steps": 500,
    "plot_loss": True,
    "overwrite_output_dir": True,
    "save_only_model": False,
    "report_to": "none",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-5,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "ddp_timeout": 180000000,
    "resume_from_checkpoint": None,
}
LORA = {**FULL, "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"}
WITH_EVALUATION = {
    **LORA,
    "val_size": 0.1,
    "per_device_eval_batch_size": 1,
    "eval_strategy": "steps",
    "eval_steps": 500,
}
ON_RAY = {
    **LORA,
    "ray_num_workers": 4,
    "ray_init_kwargs": {"runtime_env": {"env_vars": {"A": "b"}}},
    "ray_run_name": "run",
    "ray_storage_path": "./saves",
    "placement_strategy": "PACK",
    "resources_per_worker": {"GPU": 1},
}
PREPROCESSING = {
    key: value
    for key, value in LORA.items()
    if key not in ("bf16", "learning_rate", "logging_steps")
} | {"tokenized_path": "saves/tokens"}
FROM_THE_BOARD = {
    **LORA,
    "optim": "adamw_torch",
    "flash_attn": "auto",
    "include_num_input_tokens_seen": True,
    "enable_thinking": True,
    "packing": None,
    "report_to": None,
    "deepspeed": None,
    "max_grad_norm": 1.0,
    "fp16": False,
    "use_fast_tokenizer": True,
    "low_cpu_mem_usage": True,
    "average_tokens_across_devices": True,
    "freeze_vision_tower": True,
    "quantization_method": "bnb",
    "do_sample": True,
    "galore_rank": 16,
}


def load_keys(folder: Path, keys: dict[str, Any], *overrides: str) -> Any:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(keys, sort_keys=False))
    return load(path, list(overrides))


def refusal(folder: Path, keys: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(JobError) as caught:
        load_keys(folder, keys, *overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    "keys", [FULL, LORA, WITH_EVALUATION, ON_RAY, PREPROCESSING, FROM_THE_BOARD]
)
def test_a_plain_sft_file_of_llamafactory_loads(tmp_path: Path, keys: dict[str, Any]) -> None:
    job = load_keys(tmp_path, keys)
    for key, value in keys.items():
        if value is not None and key in job.flat():
            assert job.flat()[key] == value


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"quantization_bit": 4, "quantization_method": "hqq"}, ["quantization_method", "bnb"]),
        ({"quantization_bit": 4, "quantization_device_map": "auto"}, ["quantization_device_map"]),
        ({"use_galore": True, "galore_layerwise": True, "galore_rank": 128}, ["galore_layerwise"]),
        ({"use_badam": True, "badam_mode": "layer", "badam_verbose": 2}, ["use_badam", "verbose"]),
        ({"use_apollo": True, "apollo_rank": 128}, ["use_apollo", "apollo_rank"]),
        ({"mixture_of_depths": "convert", "optim": "paged_adamw_8bit"}, ["mixture", "optim"]),
        ({"image_max_pixels": 262144, "template": "llava"}, ["image_max_", "template"]),
        ({"stage": "dpo", "pref_beta": 0.2}, ["stage", "pref_beta"]),
        ({"do_train": False, "do_predict": True}, ["generates answers"]),
        ({"predict_with_generate": True}, ["predict_with_generate"]),
        ({"dataset_dir": "ONLINE"}, ["dataset_dir", "Hub datasets"]),
        ({"streaming": True, "buffer_size": 4}, ["streaming", "buffer_size"]),
        ({"use_unsloth": True, "moe_aux_loss_coef": 0.1}, ["use_unsloth", "moe_aux"]),
        (
            {"new_special_tokens_config": "t.yaml", "init_special_tokens": "desc_init"},
            ["new_special_tokens_config", "init_special"],
        ),
    ],
)
def test_what_cannot_be_honored_is_named_in_one_message(
    tmp_path: Path, extra: dict[str, Any], named: list[str]
) -> None:
    message = refusal(tmp_path, {**LORA, **extra})
    for word in named:
        assert word in message
    assert "cannot be run as written" in message


def test_several_keys_that_cannot_be_honored_make_one_message(tmp_path: Path) -> None:
    extra = {"use_unsloth": True, "deepspeed": "d.json", "streaming": True, "use_badam": True}
    message = refusal(tmp_path, {**LORA, **extra}, "use_apollo=true", "no_such_thing=1")
    assert "(6 problems)" in message


def test_every_key_of_transformers_training_arguments_has_an_entry() -> None:
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    names = set()
    for file in ("training_args.py", "training_args_seq2seq.py"):
        tree = ast.parse((Path(spec.origin).parent / file).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name.endswith("TrainingArguments"):
                names |= {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}  # type: ignore[union-attr]
    fields = {name for name in names if not name.startswith("_") and name.islower()}
    owned = {key for kind in section_types() for key in kind.model_fields}
    assert fields - owned - set(translate.known_keys()) == set()
    assert len(fields) > 100


def test_a_key_without_effect_is_noted(tmp_path: Path) -> None:
    notes = load_keys(tmp_path, LORA).notes
    assert notes == (
        "dataloader_num_workers: 4 changes nothing: "
        "batches are read ahead from a memory-mapped file",
    )


def test_eight_bit_adam_runs_as_torchaos_and_reports_it(tmp_path: Path) -> None:
    job = load_keys(tmp_path, LORA, "optim=adamw_bnb_8bit")
    assert job.train.optim == "adamw_torch_8bit"
    assert "optim: adamw_bnb_8bit runs as adamw_torch_8bit" in job.notes


def test_a_key_that_stands_for_one_that_is_given_says_so(tmp_path: Path) -> None:
    notes = load_keys(tmp_path, LORA, "fp16=true").notes  # LORA has bf16: true
    assert any(note.startswith("fp16: true runs as bf16: true, as given: ") for note in notes)


def test_a_share_in_warmup_steps_is_a_ratio(tmp_path: Path) -> None:
    keys = {key: value for key, value in LORA.items() if key != "warmup_ratio"}
    job = load_keys(tmp_path, keys, "warmup_steps=0.03")
    assert (job.train.warmup_ratio, job.train.warmup_steps) == (0.03, 0)


def test_a_share_in_warmup_steps_next_to_a_ratio_is_refused(tmp_path: Path) -> None:
    assert "warmup_steps" in refusal(tmp_path, LORA, "warmup_steps=0.03")


def test_an_older_name_is_read_as_the_newer(tmp_path: Path) -> None:
    job = load_keys(tmp_path, LORA, "evaluation_strategy=epoch", "val_size=0.1")
    assert job.output.eval_strategy == "epoch"


def test_arguments_that_transformers_has_no_longer_are_not_typing_errors(tmp_path: Path) -> None:
    assert "transformers 5 has it no longer" in refusal(tmp_path, LORA, "logging_dir=logs")
    assert load_keys(tmp_path, LORA, "half_precision_backend=auto")


def test_an_older_name_next_to_the_newer_is_refused(tmp_path: Path) -> None:
    keys = {**WITH_EVALUATION, "evaluation_strategy": "epoch"}
    assert "older name of eval_strategy" in refusal(tmp_path, keys)


def test_a_wrong_value_under_an_older_name_is_reported_under_that_name(tmp_path: Path) -> None:
    assert "evaluation_strategy: 'x'" in refusal(tmp_path, LORA, "evaluation_strategy=x")


def test_one_is_not_true(tmp_path: Path) -> None:
    assert "do_train" in refusal(tmp_path, LORA, "do_train=1")


def test_a_transform_takes_its_keys_over_from_the_table() -> None:
    assert "use_badam" in translate.known_keys()
    refused = translate.translate({"use_badam": True}, frozenset())
    taken_over = translate.translate({"use_badam": True}, frozenset({"use_badam"}))
    assert [problem.key for problem in refused.problems] == ["use_badam"]
    assert taken_over.problems == []
    assert taken_over.keys == {"use_badam": True}


def test_an_alias_of_a_transforms_key_follows_its_owner() -> None:
    keys = {"enable_liger_kernel": True}
    assert translate.translate(keys, frozenset()).unknown == ["enable_liger_kernel"]
    owned = translate.translate(keys, frozenset({"use_liger_kernel"}))
    assert owned.keys == {"use_liger_kernel": True}
