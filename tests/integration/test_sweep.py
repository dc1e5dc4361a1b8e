"""A sweep as a user runs it: real Ray with two CPUs. One that is to be killed is a process of its
own; the others run in this one.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from raytrain_adv.config import load
from tests.own_code import with_own_code

LAUNCH = [sys.executable, "-m", "raytrain_adv.launch"]
LINE = {"use_cpu": True, "val_size": 8}
OWN_RAY = {"ray_init_kwargs": {"num_cpus": 2, "include_dashboard": False}}


@pytest.fixture
def sweep_file(keys: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """Write a job file with a sweep section; the keys that it sweeps over are left out."""

    def write(section: dict[str, Any], **changed: Any) -> Path:
        path = tmp_path / "sweep.yaml"
        given = {k: v for k, v in {**keys, **LINE, **changed}.items() if k not in section}
        path.write_text(yaml.safe_dump({**given, "sweep": section}, sort_keys=False))
        return path

    return write


def trials_of(out: Path) -> dict[str, dict[str, Any]]:
    found = json.loads((out / "sweep.json").read_text())
    return {trial["name"]: trial for trial in found["trials"]}


def status_of(out: Path, name: str) -> str:
    return str(trials_of(out)[name]["status"]) if (out / "sweep.json").exists() else ""


def wait_until(condition: Callable[[], bool], driver: subprocess.Popen[Any]) -> None:
    end = time.monotonic() + 400
    while not condition():
        assert driver.poll() is None, "the driver has ended"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def kill(driver: subprocess.Popen[Any]) -> None:
    """Kill a driver and the Ray that it has started."""
    family = [*psutil.Process(driver.pid).children(recursive=True), psutil.Process(driver.pid)]
    for process in reversed(family):
        if process.is_running():
            process.kill()
    driver.wait()


@pytest.mark.slow  # three minutes beside the others; test_faults.py has the head's death under one
def test_a_killed_sweep_goes_on_and_one_trial_that_fails_does_not_end_it(
    launch, sweep_file, keys, tmp_path
):
    """Two trials at a time on two CPUs, their drivers beside them; SIGKILL when one is done, the
    other in the middle, and those whose model is not there have yet to fail."""
    models = [keys["model_name_or_path"], str(tmp_path / "no-model")]
    section = {"model_name_or_path": models, "max_steps": [6, 200]}
    often = {"save_strategy": "steps", "save_steps": 10, "logging_steps": 10}
    job = sweep_file(section, **often, **OWN_RAY)
    out = tmp_path / "out"
    short, long = (trial.name for trial in load(job).sweep.trials[:2])
    driver = subprocess.Popen([*LAUNCH, str(job)], stdout=subprocess.DEVNULL)
    checkpoints = out / "trials" / long / "checkpoints"
    try:
        wait_until(lambda: status_of(out, short) == "done", driver)
        wait_until(lambda: any(checkpoints.glob("*/step_*/manifest.json")), driver)
    finally:
        kill(driver)
    assert trials_of(out)[long]["status"] == "running"
    finished = (out / "trials" / short / "report.json").stat().st_mtime_ns

    done = launch(job, "resume_from_checkpoint=true")
    assert done.returncode == 0, done.stdout + done.stderr
    trials = trials_of(out)
    assert [t["status"] for t in trials.values()] == ["done", "done", "failed", "failed"]
    assert (out / "trials" / short / "report.json").stat().st_mtime_ns == finished
    assert trials[long]["resumed_from_step"] >= 10 and trials[long]["steps"] == 200
    assert "1 of them have already ended" in done.stdout
    assert str(tmp_path / "no-model") in done.stdout
    found = json.loads((out / "sweep.json").read_text())
    best = found["best"]
    assert found["max_concurrent_trials"] == 2
    assert trials[best]["metric"] == min(t["metric"] for t in trials.values() if t["metric"])
    assert load(out / "best_job.yaml").train.max_steps == trials[best]["values"]["max_steps"]
    page = (out / "sweep.html").read_text()
    shown = [f"{what} over" for what in ("Eval loss", "Training loss", "Eval loss")]
    labels = re.findall(r'<svg [^>]*aria-label="([^"]*)"', page)
    assert [label.partition(" over")[0] + " over" for label in labels[::2]] == shown
    assert labels[::2] == labels[1::2]  # page and phone
    console = (out / "trials" / long / "console.log").read_text()
    assert f"step {trials[long]['resumed_from_step'] + 10:3d}/200" in console


@pytest.mark.slow  # two minutes; tests/unit/driver/sweep/test_sweep.py has what it decides by
def test_asha_stops_a_trial_and_its_workers_give_back_their_cpu(launch, sweep_file, keys, tmp_path):
    """A worker takes both CPUs: the third trial can only run where the second's is gone. A step
    takes a tenth of a second, so that a stop, which takes seconds, comes before the end."""
    slow = 'trains and __import__("time").sleep(0.1)'
    with_own_code(Path(keys["model_name_or_path"]), before=slow)
    section = {"learning_rate": [1e-2, 1e-9, 2e-9], "scheduler": "asha", "grace_steps": 4}
    changed = {"max_steps": 150, "eval_strategy": "steps", "eval_steps": 4, "logging_steps": 4}
    changed["trust_remote_code"] = True
    both = {"ray_num_workers": 1, "resources_per_worker": {"CPU": 2}}
    done = launch(sweep_file(section, **changed, **both))
    assert done.returncode == 0, done.stdout + done.stderr
    first, *behind = trials_of(tmp_path / "out").values()
    assert first["status"] == "done" and len(behind) == 2
    for trial in behind:
        assert trial["status"] == "stopped" and 4 <= trial["steps"] < 150
        assert "worse than the others" in trial["error"] and "at step 4" in trial["error"]
        report = json.loads((Path(trial["output_dir"]) / "report.json").read_text())
        assert report["failure"]["kind"] == "StoppedBySweep"


def test_a_sweep_without_a_success_reports_what_ended_each_trial(launch, sweep_file, tmp_path):
    missing = [str(tmp_path / name) for name in ("no-model", "neither")]
    failed = launch(sweep_file({"model_name_or_path": missing}))
    assert failed.returncode == 3, failed.stdout + failed.stderr
    assert "No trial of the sweep succeeded" in failed.stderr and "Traceback" not in failed.stderr
    assert all(failed.stderr.count(f"{path}") >= 1 for path in missing)
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert found["status"] == "failed" and found["best"] is None
