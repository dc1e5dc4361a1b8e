"""What follows from the held-out loss during a run, on CPU processes without Ray."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import write_rows
from tests.workers import events, losses, rows, run_workers

OFTEN = {"val_size": 8, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 6}
SAVED = {"save_strategy": "steps", "save_steps": 1}


def rows_of(out: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in rows(out) if row["kind"] == kind]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_muon_resumes_bit_for_bit_and_is_the_same_on_two_workers(job_file, tmp_path, workers):
    one, out = tmp_path / "one", tmp_path / "out"
    run_workers(1, job_file("one.yaml", optim="muon", output_dir=str(one)))
    keys = {"optim": "muon", "output_dir": str(out), "save_strategy": "steps", "save_steps": 3}
    if workers == 2:
        keys["gradient_accumulation_steps"] = 1
    run_workers(workers, job_file("out.yaml", **keys))
    whole = losses(out)
    (out / "checkpoints" / "local" / "step_00000006" / "manifest.json").unlink()
    run_workers(workers, job_file("again.yaml", resume_from_checkpoint=True, **keys))
    assert losses(out) == whole
    if workers == 1:
        assert whole == losses(one)


def test_the_run_stops_early_and_exports_the_best_model(job_file, tmp_path):
    """A learning rate that is far too high: the model gets worse after its first steps."""
    out, last = tmp_path / "out", tmp_path / "last"
    keys = {**OFTEN, "learning_rate": 3.0, "lr_scheduler_type": "constant", "max_steps": 30}
    best_of = {**keys, **SAVED, "load_best_model_at_end": True, "save_total_limit": 1}
    run_workers(
        1,
        job_file("out.yaml", output_dir=str(out), early_stopping_steps=2, **best_of),
        job_file("last.yaml", output_dir=str(last), early_stopping_steps=2, **keys),
    )
    found = {row["step"]: row["loss"] for row in rows_of(out, "eval")}
    best = min(found, key=found.__getitem__)
    assert max(found) == best + 2 < 30
    assert [row["step"] for row in events(out, "early_stop")] == [best + 2]
    assert [row["step"] for row in events(out, "best")] == [best]
    exported = load_file(out / "model" / "model.safetensors")
    other = load_file(last / "model" / "model.safetensors")
    assert not all(torch.equal(exported[name], other[name]) for name in exported)
    again = tmp_path / "again"
    run_workers(
        1,
        job_file("again.yaml", **{**keys, "output_dir": str(again), "max_steps": best}),
    )
    same = load_file(again / "model" / "model.safetensors")
    assert all(torch.equal(exported[name], same[name]) for name in exported)


@pytest.mark.slow
def test_each_dataset_the_start_and_the_accuracy_are_evaluated(job_file, tmp_path):
    out = tmp_path / "out"
    names = [write_rows(tmp_path / f"{n}.json", n).name for n in (3, 5)]
    keys = {**OFTEN, "eval_dataset": names, "max_steps": 2, "output_dir": str(out)}
    keys |= {"dataset_dir": str(tmp_path), "eval_on_each_dataset": True, "eval_on_start": True}
    del keys["val_size"]
    run_workers(2, job_file("job.yaml", compute_accuracy=True, **keys))
    rows = rows_of(out, "eval")
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        low, high = sorted(row[f"loss/{name}"] for name in names)
        assert low < row["loss"] < high
        assert 0.0 <= row["accuracy"] <= 1.0
    assert rows[0]["loss"] > rows[2]["loss"]


def test_the_accuracy_is_the_share_of_labels_the_model_predicts(job_file, tmp_path):
    """A model that has learned its rows predicts them."""
    out = tmp_path / "out"
    rows = write_rows(tmp_path / "one.json", 1)
    keys = {"dataset": str(rows), "eval_dataset": str(rows), "output_dir": str(out)}
    keys |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    run_workers(1, job_file(max_steps=40, learning_rate=1e-2, compute_accuracy=True, **keys))
    assert rows_of(out, "eval")[-1]["accuracy"] == 1.0
