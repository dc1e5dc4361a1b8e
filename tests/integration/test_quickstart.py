"""The first five minutes: the quickstart's model learns its task, and the report shows that."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from raytrain_adv.config import load
from raytrain_adv.config.job import JobConfig
from raytrain_adv.driver.plan.data import DataSummary
from raytrain_adv.driver.plan.plan import resolve
from tests.conftest import ROOT
from tests.workers import losses, run_workers

JOB = ROOT / "jobs" / "quickstart.yaml"


def test_its_first_steps_learn_the_form_of_the_answers(tmp_path, monkeypatch):
    """What ten minutes of garbage would begin with: a loss that stays at ln(vocabulary) = 6.7. The
    slow test below runs it to its end.
    """
    monkeypatch.chdir(ROOT)
    job = tmp_path / "job.yaml"
    changed = {"max_steps": 40, "max_samples": 3000, "output_dir": str(tmp_path / "out")}
    changed |= {"warmup_ratio": 0.25, "fake_quant_after_n_steps": 30, "eval_steps": 40}
    lines = [line for line in JOB.read_text().splitlines() if line.split(":")[0] not in changed]
    job.write_text("\n".join([*lines, *(f"{key}: {value}" for key, value in changed.items())]))
    run_workers(2, job)
    found = losses(tmp_path / "out")
    assert found[10] > 5.5 and found[40] < 2.0


def test_it_measures_what_it_shows(monkeypatch) -> None:
    """A score before and after, QAT with a delay and its table, answers to look at; FP8 on a GPU
    by the command in its first lines.
    """
    command = next(line for line in JOB.read_text().splitlines() if "fp8=true" in line)
    overrides = [word for word in command.split() if "=" in word]
    job: JobConfig = load(str(JOB), [*overrides, "fp8_allow_cpu=true"])
    monkeypatch.chdir(ROOT)
    rows = DataSummary(9_800, 9_800, 326_713, 48, 200, None)
    plans = resolve(job, world_size=2, data=rows).transforms
    assert {name for name, plan in plans.items() if plan.changes} >= {"fp8", "qat"}
    assert job.output.eval_on_start and job.output.compute_accuracy
    assert job.output.num_sample_answers >= 3
    flat = job.flat()
    assert flat["enable_qat"] and 0 < flat["fake_quant_after_n_steps"] < flat["max_steps"]


@pytest.mark.slow  # four minutes: the whole quickstart, through Ray
def test_it_ends_with_answers_that_are_right(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "raytrain_adv.launch", str(JOB), f"output_dir={out}"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["exact_answers"][0] == [0, 0.0]
    assert report["exact_answers"][-1][1] > 0.95
    assert {one["name"] for one in report["variants"]} >= {"bf16", "PTQ", "QAT"}
    assert "of the held-out answers" in done.stdout
    assert report["samples"][0]["answer"] == report["samples"][0]["reference"]
    assert (out / "model").is_dir() and (out / "model-quantized").is_dir()
