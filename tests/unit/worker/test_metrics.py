"""What the meter counts as a step's time."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from raytrain_adv.worker import metrics
from raytrain_adv.worker.metrics import Meter


@pytest.fixture
def meter(monkeypatch):
    """Return a meter by a clock that the test moves, and the clock."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(metrics, "training_flops_per_token", lambda model, length: length)
    beat = SimpleNamespace(step_done=lambda: None, stop=lambda: None)
    run = SimpleNamespace(
        device=torch.device("cpu"), timeline={}, heartbeat=beat, say=lambda *a, **facts: None
    )
    arithmetic = SimpleNamespace(epoch_after=lambda done: 0.0)
    made = Meter(run, nn.Linear(1, 1), arithmetic, 64.0)
    made.start()
    return made, clock, run


def test_the_first_steps_compilation_is_in_no_rate(meter):
    """It was in the mean of the first logged steps, and so in a short run's median."""
    made, clock, run = meter
    for step, seconds in enumerate([30.0] + [1.0] * 9):
        clock.now += seconds
        made.end(100, torch.tensor(1.0))
        if step == 0:
            made.first_step_done()
    row = made.row(10, 20.0, 10.0, 1e-3, 0.0)
    assert row["step_s"] == pytest.approx(1.0)
    assert row["tokens_per_second_per_worker"] == pytest.approx(100.0)
    assert list(made.step_seconds) == pytest.approx([1.0] * 9)
    assert made.take_tokens() == 1000
    made.stop()
    assert run.timeline == {"first step": pytest.approx(30.0), "steps": pytest.approx(9.0)}


def test_a_row_of_the_first_step_alone_is_of_its_own_time(meter):
    made, clock, _ = meter
    clock.now += 30.0
    made.end(100, torch.tensor(1.0))
    made.first_step_done()
    clock.now += 0.5
    row = made.row(1, 2.0, 1.0, 1e-3, 0.0)
    assert row["step_s"] == pytest.approx(30.0)
    made.take_tokens()
    clock.now += 1.0
    made.end(100, torch.tensor(1.0))
    assert made.row(2, 2.0, 1.0, 1e-3, 0.0)["tokens_per_second_per_worker"] == pytest.approx(100.0)


def test_an_evaluation_before_the_first_step_is_not_in_its_time(meter):
    made, clock, run = meter
    clock.now += 7.0
    made.paused_s += 5.0
    made.end(100, torch.tensor(1.0))
    made.first_step_done()
    assert run.timeline["first step"] == pytest.approx(2.0)


def test_a_gpu_is_measured_by_what_its_driver_tells(monkeypatch):
    """A MIG slice tells no utilization; the rest is still logged."""
    pynvml = pytest.importorskip("pynvml")

    def silent(device):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(torch.cuda, "utilization", silent)
    monkeypatch.setattr(torch.cuda, "temperature", lambda device: 41)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 123_456)
    assert metrics.gpu_state(torch.device("cuda")) == {"gpu_celsius": 41.0, "gpu_watts": 123.456}


@pytest.fixture
def questions(monkeypatch):
    """Return the questions for the node's CPU, each of which ends the time of the one before."""
    found = []
    monkeypatch.setattr(metrics.psutil, "cpu_percent", lambda: found.append("asked") or 50.0)
    return found


def test_the_first_row_has_the_nodes_cpu_since_the_start(questions, meter):
    """psutil answers 0 to the first question, and the report's curve began there."""
    made, _, _ = meter
    assert len(questions) == 1
    made.end(100, torch.tensor(1.0))
    assert made.row(1, 2.0, 1.0, 1e-3, 0.0)["cpu_percent"] == 50.0
