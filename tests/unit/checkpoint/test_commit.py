"""When checkpoints are committed, where writing one takes longer than the steps between two."""

import json
import time
from itertools import count

import pytest
import torch
import torch.distributed as dist

from raytrain_adv.checkpoint import save
from raytrain_adv.config import load
from raytrain_adv.errors import StorageError
from raytrain_adv.export.model_folder import export_model
from raytrain_adv.run import run as run_module
from raytrain_adv.run.run import Run, SilentReporter, local_run
from raytrain_adv.storage.storage import Storage
from raytrain_adv.worker.train import train
from tests.ranks import run_ranks

EVERY, STEPS = 5, 24


class Watching(SilentReporter):
    """Notes at each step how many would be lost if the run were killed there."""

    def __init__(self):
        self.committed, self.lost = 0, []

    def metrics(self, row):
        self.lost.append(int(row["step"]) - self.committed)

    def checkpoint(self, storage, name, metrics):
        self.committed = int(name.removeprefix("step_"))


def lost_at_each_step(path, seconds):
    """Train while each write of a checkpoint lasts until the next is due, and some seconds more."""
    run_module.REPORT_EVERY_S = 0.0
    write, reporter, due = save.save_state, Watching(), count(2 * EVERY, EVERY)

    def slow(*args, **kwargs):
        before, end = min(next(due), STEPS) - 1, time.monotonic() + 60
        while len(reporter.lost) < before and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(seconds)
        return write(*args, **kwargs)

    save.save_state = slow
    job = load(path)
    storage = Storage.at(job.output.output_dir + "/checkpoints")
    train(job, Run(torch.device("cpu"), storage, "a", reporter, dist.new_group()), export_model)
    return reporter.lost


def test_a_kill_costs_at_most_an_interval_and_a_commit(job_file, tmp_path):
    """Writing takes longer than five steps: the next save waits, and the run reports its cost."""
    keys = {"save_strategy": "steps", "save_steps": EVERY, "max_steps": STEPS}
    path = str(job_file(**keys, export_model=False, use_cpu=True))
    (lost,) = run_ranks(lost_at_each_step, 1, tmp_path, path, 0.5)
    assert len(lost) == STEPS and max(lost) == 2 * EVERY - 1
    rows = [json.loads(x) for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    (note,) = [row["message"] for row in rows if row.get("event") == "fault"]
    assert "training waited" in note and "a larger save_steps waits less" in note
    saved = [row["step"] for row in rows if row.get("event") == "checkpoint"]
    assert saved == [5, 10, 15, 20, STEPS]


def test_a_checkpoint_that_is_not_written_names_the_disks_free_space(job_file, monkeypatch):
    """Where a disk is full, PyTorch's zip writer raises this, and no OSError."""

    def fail(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    monkeypatch.setattr(save, "save_state", fail)
    job = load(str(job_file(save_strategy="steps", save_steps=2, use_cpu=True)))
    run = local_run(job)
    with pytest.raises(StorageError, match="The checkpoint cannot be written") as caught:
        train(job, run, export_model)
    run.close()
    assert "unexpected pos" in caught.value.found and "GiB free on the disk" in caught.value.found
