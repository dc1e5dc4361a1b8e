"""What a user sees and keeps when a run fails: the cause first, no retry in vain, no checkpoint
lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from raytrain_adv.config import load
from raytrain_adv.driver.training.failures import StopWhenRetryCannotHelp
from raytrain_adv.errors import TrainingError
from raytrain_adv.export.model_folder import export_model
from raytrain_adv.run.run import Run, SilentReporter
from raytrain_adv.storage.storage import Storage
from raytrain_adv.worker.train import train
from tests.own_code import with_own_code
from tests.ranks import run_ranks
from tests.workers import losses, run_apart, run_workers


@pytest.fixture
def breaking(keys, job_file) -> Callable[..., Path]:
    """Write a job whose model, with code of its own, raises on one rank in one forward pass."""

    def write(error: str, rank: int, at_pass: int, **changed: object) -> Path:
        model = Path(keys["model_name_or_path"])
        with_own_code(model, before=f"if here: raise {error}", rank=rank, at_pass=at_pass)
        return job_file(trust_remote_code=True, use_cpu=True, **changed)

    return write


def test_the_rank_that_failed_is_named_before_those_that_failed_with_it(launch, breaking, tmp_path):
    job = breaking("ValueError('the cause')", rank=1, at_pass=3, ray_num_workers=2)
    failed = launch(job)
    assert failed.returncode == 3, failed.stdout + failed.stderr
    assert "Worker 1 failed" in failed.stderr and "ValueError: the cause" in failed.stderr
    assert "own.py" in failed.stderr  # the file and line, without a whole traceback
    assert "Connection" not in failed.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["status"] == "failed" and "the cause" in report["error"]
    assert report["steps"] == 2 and len(report["train_loss"]) == 2
    assert report["total_steps"] == 6 and report["step_seconds"] > 0 and report["restarts"] == 0
    assert "the cause" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("at_pass", [1, 3])
def test_running_again_is_no_help_where_a_step_is_out_of_memory(breaking, tmp_path, at_pass):
    error = "torch.OutOfMemoryError('tried to allocate 2.00 GiB')"
    job = breaking(error, rank=0, at_pass=at_pass)
    (said,) = run_ranks(out_of_memory, 1, tmp_path, str(job))
    assert f"optimizer step {at_pass}" in said


def out_of_memory(path):
    """Run a job to the error that ends it and its retries; return what that says."""
    job = load(path)
    storage = Storage.at(str(Path(job.output.output_dir) / "checkpoints"))
    run = Run(torch.device("cpu"), storage, "out_001", SilentReporter(), dist.new_group())
    with pytest.raises(TrainingError, match="out of memory") as failed:
        train(job, run, export_model)
    with pytest.raises(TrainingError, match="out of memory"):
        StopWhenRetryCannotHelp().after_exception(None, {0: failed.value})
    return str(failed.value)


@pytest.mark.slow  # a minute beside the others
def test_out_of_memory_in_the_first_step_is_not_tried_again(launch, breaking, tmp_path):
    error = "torch.OutOfMemoryError('tried to allocate 2.00 GiB')"
    failed = launch(breaking(error, rank=0, at_pass=1, ray_num_workers=1, max_failures=3))
    assert failed.returncode == 3, failed.stdout + failed.stderr
    assert "out of memory" in failed.stderr and "optimizer step 1" in failed.stderr
    starts = tmp_path / "out" / "checkpoints" / "out_001" / "starts.json"
    assert json.loads(starts.read_text())["starts"] == 1


def test_a_disk_that_fills_up_loses_no_checkpoint(job_file, tmp_path, monkeypatch):
    """Files may not grow beyond half a checkpoint; with room again the run goes on, bit for bit."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    often = {"save_strategy": "steps", "save_steps": 3}
    run_workers(
        1, job_file("whole.yaml", output_dir=str(whole), **often), job_file("out.yaml", **often)
    )
    last = out / "checkpoints" / "local" / "step_00000006"
    limit = (last / "__0_0.distcp").stat().st_size // 2
    (last / "manifest.json").unlink()
    resume = job_file("resume.yaml", resume_from_checkpoint=True, **often)
    monkeypatch.setenv("LARGEST_FILE", str(limit))
    code, said = run_apart(resume)
    assert code and "The checkpoint cannot be written" in said, said
    assert "fix:" in said
    monkeypatch.delenv("LARGEST_FILE")
    assert run_workers(1, resume)[0]["resumed_from_step"] == 3
    assert losses(out) == losses(whole)
    assert os.path.exists(out / "model" / "model.safetensors")
