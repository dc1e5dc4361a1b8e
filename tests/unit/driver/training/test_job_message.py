"""The status message of a submitted job. tests/integration/test_submit.py asks a dashboard."""

import json

import pytest

from raytrain_adv.driver.training import job_message
from raytrain_adv.driver.training.console import Progress
from raytrain_adv.driver.training.job_message import JobMessage, submission_id

CONFIG = json.dumps({"metadata": {"job_submission_id": "run-1"}})
TRAIN = {"kind": "train", "loss": 2.5, "step_s": 2.0, "time": 10.0, "data_wait_s": 0.0}


@pytest.fixture
def written(monkeypatch):
    """Return the messages that the cluster gets, of a job that was submitted."""
    found = []

    async def put(job, message):
        found.append((job, message))

    monkeypatch.setenv(job_message.RAY_JOB_CONFIG_JSON_ENV_VAR, CONFIG)
    monkeypatch.setattr(job_message, "_put", put)
    monkeypatch.setattr(job_message.ray, "is_initialized", lambda: True)
    return found


def test_the_message_has_step_loss_and_time_left():
    progress = Progress(total_steps=100, phase="starting the workers")
    assert progress.sentence() == "starting the workers"
    progress.take({**TRAIN, "step": 40})
    progress.phase = "training"
    assert progress.sentence() == "step 40/100, loss 2.5000, 2:00 left"
    progress.phase = "export"
    assert progress.sentence().endswith("left, export")


def test_messages_are_written_when_they_are_new_and_due(written, monkeypatch):
    message = JobMessage(print)
    for now, text in ((100.0, "a"), (101.0, "b"), (106.0, "c"), (120.0, "c")):
        monkeypatch.setattr(job_message.time, "monotonic", lambda now=now: now)
        message.tell(text)
    assert written == [("run-1", "a"), ("run-1", "c")]


def test_a_launch_that_was_not_submitted_has_no_message(written, monkeypatch):
    monkeypatch.delenv(job_message.RAY_JOB_CONFIG_JSON_ENV_VAR)
    assert submission_id() is None
    JobMessage(print).tell("a")
    assert not written


def test_a_cluster_that_takes_no_message_is_told_once(written, monkeypatch):
    async def refuse(job, message):
        raise RuntimeError("no such table")

    monkeypatch.setattr(job_message, "_put", refuse)
    monkeypatch.setattr(job_message, "REFRESH_S", 0.0)
    said = []
    message = JobMessage(said.append)
    message.tell("a")
    message.tell("b")
    assert said == ["The job's status message cannot be written: no such table"]
