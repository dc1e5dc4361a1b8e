"""The training line on CPU processes over gloo: what must hold whatever starts the workers."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.workers import column, losses, run_workers

PLAIN = {"gradient_checkpointing": None, "disable_gradient_checkpointing": True}
SPREADS = {
    "offload": {"fsdp_cpu_offload": True},
    "keep-gathered": {"fsdp_reshard_after_forward": False},
    "full": {"gradient_checkpointing": "full", "disable_gradient_checkpointing": False},
    "selective": {"gradient_checkpointing": "selective", "disable_gradient_checkpointing": False},
    "unfused": {"optim": "adamw_torch"},
}


def kill_last_checkpoint(out: Path) -> None:
    """Leave what a kill between the last checkpoint's files and its manifest leaves."""
    (out / "checkpoints" / "local" / "step_00000006" / "manifest.json").unlink()


def test_neither_workers_nor_spreading_changes_the_losses(job_file, tmp_path):
    """Workers x accumulation 1x4, 2x2 and 4x1, HSDP, every way to spread the model; dropout on."""

    def job(name, **changed):
        return job_file(f"{name}.yaml", output_dir=str(tmp_path / name), **changed)

    packed = {"neat_packing": True, "per_device_train_batch_size": 1}
    run_workers(
        1,
        job("1x4", gradient_accumulation_steps=4),
        job("1x4-packed", gradient_accumulation_steps=4, **packed),
    )
    spreads = [job(k, gradient_accumulation_steps=2, **v) for k, v in SPREADS.items()]
    run_workers(
        2,
        job("2x2", gradient_accumulation_steps=2),
        job("2x2-packed", gradient_accumulation_steps=2, **packed),
        *spreads,
    )
    run_workers(4, job("4x1"), job("hsdp", fsdp_shard_size=2, ray_num_workers=4))
    reference = list(losses(tmp_path / "1x4").values())
    assert len(reference) == 6 and reference[-1] < reference[0] - 0.1
    for name in ("2x2", "4x1", "hsdp", *SPREADS):
        found = list(losses(tmp_path / name).values())
        assert found == pytest.approx(reference, rel=2e-5), name
    packed_losses = [list(losses(tmp_path / n).values()) for n in ("1x4-packed", "2x2-packed")]
    assert packed_losses[0] == pytest.approx(packed_losses[1], rel=2e-5)


@pytest.mark.parametrize(
    ("workers", "optim"),
    [
        (1, "adamw_torch_fused"),
        (2, "adamw_torch_fused"),
        (2, "adamw_torch_8bit"),
        pytest.param(1, "adamw_torch_8bit", marks=pytest.mark.slow),  # whose step compiles
    ],
)
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(job_file, tmp_path, workers, optim):
    """Dropout is on; logging every 2 steps and saving every 3, so a window spans the checkpoint."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    keys = {"optim": optim, "logging_steps": 2}
    on_part = {**keys, "save_strategy": "steps", "save_steps": 3, "output_dir": str(part)}
    run_workers(
        workers,
        job_file("whole.yaml", output_dir=str(whole), **keys),
        job_file("part.yaml", **on_part),
    )
    kill_last_checkpoint(part)
    (figures,) = run_workers(
        workers, job_file("part2.yaml", resume_from_checkpoint=True, **on_part)
    )
    assert figures["resumed_from_step"] == 3
    assert losses(part) == losses(whole)
    assert column(part, "grad_norm") == column(whole, "grad_norm")


@pytest.mark.parametrize(
    ("optim", "others"),
    [
        ("adamw_torch_fused", ((4, 1), (1, 4))),
        ("adamw_torch_8bit", ((1, 4),)),
        pytest.param("adamw_torch_8bit", ((4, 1),), marks=pytest.mark.slow),  # four that compile
    ],
)
def test_a_run_resumes_on_another_number_of_workers(job_file, tmp_path, optim, others):
    out = tmp_path / "out"
    keys = {"save_strategy": "steps", "save_steps": 3, "optim": optim}
    run_workers(2, job_file("a.yaml", gradient_accumulation_steps=2, **keys))
    expected = list(losses(out).values())
    for workers, accumulation in others:
        kill_last_checkpoint(out)
        keys |= {"resume_from_checkpoint": True, "gradient_accumulation_steps": accumulation}
        assert run_workers(workers, job_file("b.yaml", **keys))[0]["resumed_from_step"] == 3
        assert list(losses(out).values()) == pytest.approx(
            expected, rel=1e-3 if "8bit" in optim else 1e-4
        )


def test_lora_trains_saves_resumes_and_exports(job_file, tmp_path):
    base, out = tmp_path / "base", tmp_path / "lora"
    (figures,) = run_workers(2, job_file("base.yaml", output_dir=str(base), bf16=True))
    assert AutoModelForCausalLM.from_pretrained(figures["model_dir"]).num_parameters() > 1000
    common = {
        "model_name_or_path": str(base / "model"),
        "train_from_scratch": False,
        "finetuning_type": "lora",
        "lora_dropout": 0.1,
        "bf16": True,
        "output_dir": str(out),
        "save_strategy": "steps",
        "save_steps": 3,
        "per_device_train_batch_size": 16,
    }
    run_workers(2, job_file("a.yaml", **common))
    first = losses(out)
    assert first[6] < first[1]
    assert (out / "model" / "adapter_config.json").exists()
    kill_last_checkpoint(out)
    run_workers(2, job_file("b.yaml", resume_from_checkpoint=True, **common))
    assert losses(out) == first
