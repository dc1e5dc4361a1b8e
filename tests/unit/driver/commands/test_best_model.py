"""The model that load_best_model_at_end exports is the one of which later commands tell."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from raytrain_adv import cli
from raytrain_adv.config import load
from raytrain_adv.report.card import write_card
from raytrain_adv.report.record import RunReport
from raytrain_adv.storage.metrics_file import best_step, read, replace
from tests.unit.driver.commands.use.conftest import finish
from tests.workers import run_workers


@pytest.fixture
def best(job_file):
    """Return the output_dir of a run whose best evaluation, by accuracy, was not its last."""
    evaluates = {"eval_strategy": "steps", "eval_steps": 1, "val_size": 9, "compute_accuracy": True}
    takes = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    saves = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3, "learning_rate": 3.0}
    file = job_file(**evaluates, **takes, **saves)
    (figures,) = run_workers(1, file)
    job = load(file)
    finish(job)
    folder = Path(job.output.output_dir)
    rows = read(folder / "metrics.jsonl")
    step = best_step(rows)
    assert step in (1, 2) and figures["steps"] == 3
    for row in rows:
        if row["kind"] == "eval" and row["step"] != step:
            row["loss"] = 0.001  # the least loss is not that of the most accurate
    replace(folder / "metrics.jsonl", rows)
    return job, step


def loss_at(folder, step):
    rows = read(folder / "metrics.jsonl")
    return next(r["loss"] for r in rows if r["kind"] == "eval" and r["step"] == step)


def test_the_loss_in_its_run_is_that_of_the_model_it_exported(best):
    """It was the least loss, whatever decided which model is best."""
    job, step = best
    folder = Path(job.output.output_dir)
    assert cli.main(["evaluate", str(folder), "--device", "cpu"]) == 0
    (model,) = json.loads((folder / "evaluation.json").read_text())["models"]
    assert model["loss_in_its_run"] == loss_at(folder, step)
    value = model["figures"]["held-out loss"]["value"]
    assert value == pytest.approx(loss_at(folder, step), rel=1e-5)


def test_export_writes_the_best_model_again(best):
    """It wrote the newest checkpoint's, beside a card that told the best one's loss."""
    job, step = best
    folder = Path(job.output.output_dir)
    assert cli.main(["export", str(folder)]) == 0
    again = load_file(folder / f"exported-step_{step}" / "model" / "model.safetensors")
    first = load_file(folder / "model" / "model.safetensors")
    assert all(first[name].equal(value) for name, value in again.items())


def test_the_card_tells_the_loss_of_the_best_model(best):
    job, step = best
    folder = Path(job.output.output_dir)
    points = tuple((s, loss_at(folder, s)) for s in (1, 2, 3))
    report = RunReport(status="done", steps=3, eval_loss=points, best_step=step)
    write_card(folder / "model", job, report)
    assert (
        f"| held-out loss | {loss_at(folder, step):,.4f} |"
        in (folder / "model" / "README.md").read_text()
    )


def test_a_run_that_was_continued_has_no_best_model_yet():
    ended = {"kind": "event", "event": "best", "step": 2}
    continued = {"kind": "event", "event": "resume", "step": 3}
    assert best_step([]) is None and best_step([ended]) == 2
    assert best_step([ended, continued]) is None
    assert best_step([ended, continued, ended | {"step": 4}]) == 4


def test_the_best_model_is_one_that_was_trained(job_file):
    """A run that only made its model worse failed at its end: of that before the first step there
    is no checkpoint.
    """
    evaluates = {"eval_strategy": "steps", "eval_steps": 1, "val_size": 9, "eval_on_start": True}
    saves = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3, "learning_rate": 3.0}
    file = job_file(**evaluates, load_best_model_at_end=True, **saves)
    (figures,) = run_workers(1, file)
    rows = read(Path(load(file).output.output_dir) / "metrics.jsonl")
    start, *others = (row["loss"] for row in rows if row["kind"] == "eval")
    assert start < min(others) and figures["model_dir"] is not None
    assert others[best_step(rows) - 1] == min(others)
