"""Each of LLaMA-Factory's examples of supervised fine-tuning on text: it loads, or one message
names every key that cannot be honored.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml

from raytrain_adv.config import load
from raytrain_adv.config.schema import schema
from raytrain_adv.config.templates import Template
from raytrain_adv.errors import JobError

FACTS = yaml.safe_load(Path(__file__).with_name("examples.yaml").read_text())
FILES: dict[str, dict[str, Any]] = FACTS["files"]
VALIDATOR = jsonschema.Draft202012Validator(schema())
LORA: dict[str, Any] = {
    **FACTS["common"],
    "model_name_or_path": "org/model",
    "output_dir": "saves/run",
    "finetuning_type": "lora",
}
ZERO = {
    "ds_z0_config": {"stage": 0},
    "ds_z3_config": {"stage": 3},
    "ds_z3_fp8_config": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
}


def keys_of(name: str, folder: Path) -> dict[str, Any]:
    """Return an example's keys, with a DeepSpeed file of ours."""
    file = FILES[name]
    common = {k: v for k, v in FACTS["common"].items() if k not in file.get("without", ())}
    keys = {**common, **file["keys"]}
    keys |= {"model_name_or_path": file["model"], "output_dir": str(folder / "out")}
    if "deepspeed" in keys:
        path = folder / "deepspeed.json"
        path.write_text(json.dumps({"zero_optimization": ZERO[Path(keys["deepspeed"]).stem]}))
        keys["deepspeed"] = str(path)
    return keys


def answer(folder: Path, keys: dict[str, Any]) -> str:
    """Return the refusal, or nothing for keys that load."""
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(keys, sort_keys=False))
    try:
        load(path)
    except JobError as error:
        return str(error)
    return ""


def test_there_are_41_examples_and_36_load() -> None:
    assert len(FILES) == 41
    assert sum("refused" not in file for file in FILES.values()) == 36


@pytest.mark.parametrize("name", FILES)
def test_an_example_loads_or_names_each_key_that_cannot_be_honored(
    tmp_path: Path, name: str
) -> None:
    keys, refused = keys_of(name, tmp_path), set(FILES[name].get("refused", ()))
    found, _, fix = answer(tmp_path, keys).partition("  fix:")
    named = set(re.findall(r"(?:line \d+: |  found: )(?!line)(\w+): ", found))
    unknown = {"template"} if keys.get("template", "qwen") not in get_args(Template) else set()
    assert named == refused | unknown
    assert all(key in fix for key in refused)
    if not named and not name.startswith("megatron"):  # accepted at their defaults, not offered
        VALIDATOR.validate(keys)


def test_no_remedy_names_a_key_that_is_refused_itself(tmp_path: Path) -> None:
    for name, file in FILES.items():
        fix = answer(tmp_path, keys_of(name, tmp_path)).partition("  fix:")[2]
        meant = set(re.findall(r"did you mean (\w+)\?", fix))
        assert not meant & set(file.get("refused", ())), name


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


def other(folder: Path, name: str, content: dict[str, Any]) -> str:
    path = folder / name
    path.write_text(json.dumps(content))
    return str(path)


OFFLOAD = {"offload_param": {"device": "cpu"}}
SHARDED = ("fsdp_shard_size", "fsdp_reshard_after_forward", "fsdp_cpu_offload")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("deepspeed", {"zero_optimization": {"stage": 0}}, (1, None, False)),
        ("deepspeed", {"zero_optimization": {"stage": 2}}, (None, False, False)),
        ("deepspeed", {"zero_optimization": {"stage": 3, **OFFLOAD}}, (None, True, True)),
        ("fsdp", "full_shard auto_wrap", (None, True, False)),
        ("fsdp", ["shard_grad_op", "offload"], (None, False, True)),
        ("fsdp_config", {"fsdp_offload_params": True, "fsdp_version": 2}, (None, None, True)),
        ("fsdp_config", {"reshard_after_forward": False}, (None, False, False)),
        ("fsdp_config", {"fsdp_sharding_strategy": 3}, (1, None, False)),
    ],
)
@pytest.mark.parametrize("in_a_file", [True, False])
def test_files_of_deepspeed_and_fsdp_become_keys_of_fsdp2_and_a_note_says_which(
    tmp_path: Path, key: str, value: Any, expected: tuple[Any, ...], in_a_file: bool
) -> None:
    keys = LORA | {key: value}
    if in_a_file and key != "fsdp":
        keys[key] = other(tmp_path, "spread.json", value)
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(keys))
    job = load(path)
    assert tuple(getattr(job.parallel, name) for name in SHARDED) == expected
    note = next(note for note in job.notes if note.startswith(f"{key}: "))
    for name, found in zip(SHARDED, expected, strict=True):
        if found != type(job.parallel).default(name):
            assert name in note


def test_a_file_of_accelerate_gives_workers_precision_and_fsdp2(tmp_path: Path) -> None:
    content = {
        "distributed_type": "FSDP",
        "mixed_precision": "bf16",
        "num_processes": 2,
        "fsdp_config": {"fsdp_sharding_strategy": "SHARD_GRAD_OP", "fsdp_use_orig_params": True},
    }
    path = tmp_path / "job.yaml"
    keys = {key: value for key, value in LORA.items() if key != "bf16"}
    spread = other(tmp_path, "accelerate.yaml", content)
    path.write_text(yaml.safe_dump(keys | {"fsdp_config": spread}))
    job = load(path)
    assert job.ray.ray_num_workers == 2 and job.train.bf16
    assert not job.parallel.fsdp_reshard_after_forward
    direct = answer(tmp_path, content)
    assert "a file for accelerate launch" in direct and "fsdp_config: FILE" in direct


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("deepspeed", {"zero_optimization": {"offload_param": {"device": "nvme"}}}, "NVMe"),
        ("deepspeed", {"tensor_parallel": {"autotp_size": 2}}, "tensor parallelism"),
        ("deepspeed", {"optimizer": {"type": "AdamW"}}, "its own optimizer"),
        ("deepspeed", "missing.json", "cannot be read"),
        ("fsdp", "hybrid_shard", "fsdp_shard_size"),
        ("fsdp", "fast", "not a sharding strategy"),
        ("fsdp_config", {"unheard": 1}, "unheard"),
        ("fsdp_config", {"distributed_type": "DEEPSPEED"}, "deepspeed: FILE"),
        ("fsdp_config", {"distributed_type": "MULTI_GPU"}, "ray_num_workers"),
    ],
)
def test_what_fsdp2_cannot_do_is_refused_under_the_files_key(
    tmp_path: Path, key: str, value: Any, words: str
) -> None:
    text = answer(tmp_path, LORA | {key: value})
    assert words in text and f"{key}: " in text and "(1 problem)" in text


def test_a_key_in_the_job_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    spread = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3}}
    path.write_text(yaml.safe_dump(LORA | {"deepspeed": spread}))
    assert load(path).train.per_device_train_batch_size == 1


@pytest.mark.parametrize(
    ("key", "ours", "expected"),
    [("fp16", "bf16", True), ("use_muon", "optim", "muon"), ("use_kt", "fsdp_cpu_offload", True)],
)
def test_a_mapped_key_acts_and_says_so(
    tmp_path: Path, key: str, ours: str, expected: object
) -> None:
    path = tmp_path / "job.yaml"
    keys = {name: value for name, value in LORA.items() if name != "bf16"}
    path.write_text(yaml.safe_dump(keys | {key: True}))
    job = load(path)
    assert job.flat()[ours] == expected
    assert any(note.startswith(f"{key}: true runs as {ours}: ") for note in job.notes)


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP"}, "accelerate launch"),
        ({"zero_optimization": {"stage": 3}}, "DeepSpeed"),
        ({"model_name_or_path": "m", "infer_backend": "huggingface"}, "chat or api"),
        (
            {"model_name_or_path": "m", "export_dir": "e", "export_size": 5},
            "llamafactory-cli export",
        ),
        ({"model_name_or_path": "m", "do_predict": True, "eval_dataset": "d"}, "generates answers"),
        ({"model": "m", "model_class": "llm", "micro_batch_size": 1}, "v1"),
        ({"model": "m", "quant_config": {"name": "bnb"}}, "quantization_bit"),
        ({"model": "m", "kernel_config": {"name": "liger_kernel"}}, "use_liger_kernel"),
    ],
)
def test_a_file_that_is_no_training_job_is_recognized(
    tmp_path: Path, keys: dict[str, Any], what: str
) -> None:
    text = answer(tmp_path, keys)
    assert what in text and "(1 problem)" in text
