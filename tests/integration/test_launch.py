"""python -m raytrain_adv.launch as a user runs it: real Ray, two CPU workers, gloo. What is to be
killed is a process of its own; the others run in this one, on one Ray. A whole run is that of
test_whole_run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.workers import losses

LAUNCH = [sys.executable, "-m", "raytrain_adv.launch"]
LINE = {"ray_num_workers": 2, "use_cpu": True, "val_size": 8}
KILLED = {**LINE, "ray_init_kwargs": {"include_dashboard": False}, "save_strategy": "steps"}


def wait_until(condition: Callable[[], bool], timeout_s: float = 600) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("waited in vain")
        time.sleep(0.05)


def steps_done(folder: Path) -> int:
    try:
        return max(losses(folder), default=0)
    except (FileNotFoundError, ValueError):
        return 0


@pytest.mark.slow
def test_a_killed_driver_is_no_loss(launch, job_file, tmp_path):
    """After SIGKILL of the driver the job with resume_from_checkpoint goes on where it stopped."""
    job = job_file(**KILLED, max_steps=60, save_steps=5)
    driver = subprocess.Popen([*LAUNCH, str(job)], stdout=subprocess.DEVNULL)
    out = tmp_path / "out"
    wait_until(lambda: any(out.glob("checkpoints/*/step_*/manifest.json")))
    family = [*psutil.Process(driver.pid).children(recursive=True), psutil.Process(driver.pid)]
    for process in reversed(family):
        if process.is_running():
            process.send_signal(signal.SIGKILL)
    driver.wait()
    refused = launch(job)
    assert refused.returncode == 2 and "resume_from_checkpoint: true" in refused.stderr
    done = launch(job, "resume_from_checkpoint=true")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["resumed_from_step"] >= 5
    assert sorted(losses(out)) == list(range(1, 61))
    finished = launch(job, "resume_from_checkpoint=true")
    assert finished.returncode == 0 and "has already finished" in finished.stdout
    other = launch(job, "resume_from_checkpoint=true", "learning_rate=0.5")
    assert other.returncode == 2 and "learning_rate" in other.stderr


def test_more_workers_than_the_cluster_has_is_refused_within_ten_seconds(launch, job_file):
    job = job_file(**{**LINE, "ray_num_workers": 4096})

    def seconds_until_refused() -> float:
        start = time.monotonic()
        refused = launch(job)
        assert refused.returncode == 4
        assert "4,096 workers" in refused.stderr and "fix:" in refused.stderr
        return time.monotonic() - start

    assert any(seconds_until_refused() < 10 for _ in range(3))  # the machine may be busy


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"model_name_or_path": "/nowhere/model"}, "/nowhere/model"),
        ({"train_from_scratch": False}, "weights"),
        ({"dataset": "/nowhere/data.json"}, "data.json"),
        ({"learning_rat": 1}, "learning_rate"),
    ],
)
def test_what_the_job_gets_wrong_is_said_in_the_house_form(launch, job_file, broken, says):
    refused = launch(job_file(**{**LINE, **broken}))
    assert refused.returncode == 2
    assert says in refused.stderr and "fix:" in refused.stderr
    assert "Traceback" not in refused.stderr + refused.stdout


def test_an_error_on_a_worker_reaches_the_user_as_itself(launch, job_file, tmp_path):
    """A checkpoint that cannot be written: its folder's place is taken by a file."""
    keys = {**LINE, "ray_num_workers": 1, "save_strategy": "steps", "save_steps": 2}
    keys["max_failures"] = 3
    blocked = tmp_path / "storage"
    job = job_file(**keys, ray_storage_path=str(blocked), ray_run_name="run")
    attempt = blocked / "run" / "run_001"

    def put_it_in_the_way() -> None:
        wait_until(attempt.is_dir)  # as the run begins
        (attempt / "step_00000002").write_text("in the way")

    thread = threading.Thread(target=put_it_in_the_way)
    thread.start()
    failed = launch(job)
    thread.join()
    assert failed.returncode == 3, failed.stdout + failed.stderr
    assert "step_00000002" in failed.stderr and "Traceback" not in failed.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["status"] == "failed" and "step_00000002" in report["error"]
    assert os.path.exists(tmp_path / "out" / "report.html")
