"""FP8 on CPU processes over gloo: torch._scaled_mm computes for real there, only slowly."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.test_line_without_ray import kill_last_checkpoint
from tests.workers import losses, run_workers

FP8 = {"fp8": True, "fp8_allow_cpu": True, "fp8_min_features": 16, "bf16": True}
GATHERED = {**FP8, "fp8_enable_fsdp_float8_all_gather": True}
PURE = {"pure_bf16": True, "bf16": False}
SAVED = {"save_strategy": "steps", "save_steps": 3}

# A process that may not import torchao reads a checkpoint.
READ = """
import sys
sys.modules["torchao"] = None
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
dcp_to_torch_save(sys.argv[1], sys.argv[2])
state = torch.load(sys.argv[2], weights_only=True)
tensors = [*state["model"].values()]
assert len(tensors) > 10 and all(type(t) is torch.Tensor for t in tensors), tensors
print("read", len(tensors))
"""


def checkpoint(out: Path, step: int) -> Path:
    return out / "checkpoints" / "local" / f"step_{step:08d}"


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gathering_in_fp8_with_precomputed_scales_changes_no_bit(job_file, tmp_path, workers):
    """With bf16 parameters the cast before the gather is the cast after it."""

    def job(name, **changed):
        return job_file(f"{name}.yaml", output_dir=str(tmp_path / name), **changed)

    run_workers(
        workers,
        job("bf16", bf16=True),
        job("fp8", **FP8),
        job("head", **FP8, fp8_lm_head=True),
        job("local", **{**FP8, **PURE}),
        job("gathered", **{**GATHERED, **PURE}),
        job("master-weights", **GATHERED),
    )
    reference = list(losses(tmp_path / "bf16").values())
    assert losses(tmp_path / "gathered") == losses(tmp_path / "local")
    assert losses(tmp_path / "head") != losses(tmp_path / "fp8")
    for name in ("fp8", "head", "gathered", "master-weights"):
        found = list(losses(tmp_path / name).values())
        assert found != reference, f"{name} trained in bf16"
        assert found == pytest.approx(reference, rel=5e-3), name


def test_an_fp8_checkpoint_goes_on_anywhere(job_file, tmp_path):
    """Written by 2 workers that gather in FP8; read without torchao, by 1 and by 4 workers, and by
    a bf16 job that names it.
    """
    out = tmp_path / "out"
    keys = {**GATHERED, **SAVED}
    run_workers(2, job_file("a.yaml", gradient_accumulation_steps=2, **keys))
    expected = list(losses(out).values())
    reading = [sys.executable, "-c", READ, str(checkpoint(out, 3)), str(tmp_path / "plain.pt")]
    assert "read" in subprocess.run(reading, capture_output=True, text=True, check=True).stdout
    shutil.copytree(out, tmp_path / "kept")
    for workers, accumulation in ((1, 4), (4, 1)):
        kill_last_checkpoint(out)
        job = job_file(
            "b.yaml",
            gradient_accumulation_steps=accumulation,
            resume_from_checkpoint=True,
            **keys,
        )
        assert run_workers(workers, job)[0]["resumed_from_step"] == 3
        assert list(losses(out).values()) == pytest.approx(expected, rel=2e-3)
    named = job_file(
        "c.yaml",
        output_dir=str(tmp_path / "bf16"),
        resume_from_checkpoint=str(checkpoint(tmp_path / "kept", 3)),
        gradient_accumulation_steps=4,
        bf16=True,
    )
    assert run_workers(1, named)[0]["resumed_from_step"] == 3
    found = list(losses(tmp_path / "bf16").values())
    assert found == pytest.approx(expected[3:], rel=5e-3)
    rows = (tmp_path / "bf16" / "metrics.jsonl").read_text().splitlines()
    told = [r["message"] for r in map(json.loads, rows) if r["kind"] == "event"]
    assert any("another precision: fp8: True then, False now" in line for line in told)


def test_a_resumed_fp8_run_is_the_uninterrupted_run_bit_for_bit(job_file, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    keys = {**GATHERED, "save_strategy": "steps", "save_steps": 3}
    run_workers(
        2,
        job_file("whole.yaml", output_dir=str(whole), **GATHERED),
        job_file("part.yaml", output_dir=str(part), **keys),
    )
    kill_last_checkpoint(part)
    again = job_file("again.yaml", output_dir=str(part), resume_from_checkpoint=True, **keys)
    assert run_workers(2, again)[0]["resumed_from_step"] == 3
    assert losses(part) == losses(whole)


@pytest.mark.slow  # a minute of compilation
def test_fp8_compiled_checkpointed_and_under_lora(job_file, tmp_path):
    base = tmp_path / "base"
    # One shape, compiled once; test_matrix.py compiles FP8 for rows of several lengths.
    packed = {"packing": True, "cutoff_len": 64}
    compiled = {"torch_compile": True, "disable_gradient_checkpointing": False}
    (figures, *_) = run_workers(
        2,
        job_file("base.yaml", output_dir=str(base), **FP8, **packed),
        job_file("c.yaml", output_dir=str(tmp_path / "c"), **GATHERED, **packed, **compiled),
    )
    lora = {
        **FP8,
        "model_name_or_path": figures["model_dir"],
        "train_from_scratch": False,
        "finetuning_type": "lora",
        "lora_rank": 16,
        "per_device_train_batch_size": 16,
    }
    plain = {key: value for key, value in lora.items() if not key.startswith("fp8")}
    run_workers(
        2,
        job_file("lora.yaml", output_dir=str(tmp_path / "lora"), **lora),
        job_file("plain.yaml", output_dir=str(tmp_path / "plain"), **plain),
    )
    found, reference = losses(tmp_path / "lora"), losses(tmp_path / "plain")
    assert found[6] < found[1]
    assert found != reference, "the base trained in bf16"
    assert list(found.values()) == pytest.approx(list(reference.values()), rel=5e-3)
    expected = list(losses(base).values())
    assert list(losses(tmp_path / "c").values()) == pytest.approx(expected, rel=5e-3)


def test_what_stays_gathered_after_a_forward_pass_is_exported_from_its_shards(
    job_file, keys, tmp_path
):
    """Evaluation and sample answers leave whole weights there, in float8 or rounded to bf16."""
    config = Path(keys["model_name_or_path"]) / "config.json"
    short = {"max_position_embeddings": 24}  # a dozen passes make an answer
    config.write_text(json.dumps({**json.loads(config.read_text()), **short}))
    stays = {"fsdp_reshard_after_forward": False, "num_sample_answers": 1, "val_size": 8}

    def job(name, **changed):
        return job_file(f"{name}.yaml", output_dir=str(tmp_path / name), cutoff_len=24, **changed)

    plain, kept = job("base", **GATHERED, val_size=8), job("base-stays", **GATHERED, **stays)
    figures, _ = run_workers(2, plain, kept)
    lora = {
        "model_name_or_path": figures["model_dir"],
        "train_from_scratch": False,
        "finetuning_type": "lora",
        "bf16": True,
        "lora_rank": 4,
    }
    run_workers(2, job("lora", **lora, val_size=8), job("lora-stays", **lora, **stays))
    for name, file in (("base", "model"), ("lora", "adapter_model")):
        one, two = (tmp_path / f"{run}/model/{file}.safetensors" for run in (name, f"{name}-stays"))
        assert one.read_bytes() == two.read_bytes()


def test_experts_train_in_fp8_on_two_workers_with_a_profile_that_shows_it(job_file, keys, tmp_path):
    """Sharded, with every activation kept, none, or products alone."""
    config = Path(keys["model_name_or_path"]) / "config.json"
    mixture = {"num_local_experts": 4, "architectures": ["MixtralForCausalLM"]}
    changed = {**json.loads(config.read_text()), "model_type": "mixtral", **mixture}
    config.write_text(json.dumps(changed))
    every = {**FP8, "fp8_experts": True}
    variants = {
        "bf16": {"bf16": True},
        "fp8": every,
        "recomputed": {**every, "disable_gradient_checkpointing": False},
        "selective": {
            **every,
            "disable_gradient_checkpointing": False,
            "gradient_checkpointing": "selective",
        },
    }
    jobs = [job_file(f"{n}.yaml", output_dir=str(tmp_path / n), **v) for n, v in variants.items()]
    figures = dict(zip(variants, run_workers(2, *jobs), strict=True))
    reference = list(losses(tmp_path / "bf16").values())
    found = {name: list(losses(tmp_path / name).values()) for name in variants}
    assert found["recomputed"] == found["fp8"] != reference
    for name in variants:
        assert found[name] == pytest.approx(reference, rel=2e-2), name
        if name != "bf16":
            proof = figures[name]["proof"]["fp8"]
            assert (proof["operator"], proof["modules"]) == ("aten::_scaled_mm", 8)
            (grouped,) = proof["others"]
            assert grouped["operator"] == "aten::_scaled_grouped_mm" and grouped["modules"] == 2
            # Of each layer's two matrices: forward, and two gradients.
            assert grouped["calls"] == (16 if name == "recomputed" else 12)
