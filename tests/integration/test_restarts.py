"""A run that is stopped and started again and again: what it leaves is what one run leaves."""

from __future__ import annotations

import gc
import json
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from raytrain_adv.checkpoint.folders import all_folders, find
from raytrain_adv.config import load
from raytrain_adv.driver.commands.doctor import show
from raytrain_adv.driver.output.output_dir import open_output
from raytrain_adv.errors import Stopped
from raytrain_adv.export.model_folder import export_model
from raytrain_adv.report import record
from raytrain_adv.report.build import started
from raytrain_adv.run import run as run_module
from raytrain_adv.run.run import Run, SilentReporter
from raytrain_adv.storage.storage import Storage
from raytrain_adv.worker.train import train
from tests.ranks import run_ranks
from tests.workers import losses

STARTS, LAST, EVERY, KEPT = 21, 70, 3, 3


class Killed(RuntimeError):
    """Stands for a SIGKILL after a step's row was written."""


class Ending(SilentReporter):
    """Ends an attempt after a step: in the middle of things, or as SIGTERM does, with a
    checkpoint.
    """

    def __init__(self, last: int, kills: bool) -> None:
        self.last, self.kills, self.asked = last, kills, 0

    def metrics(self, row: dict[str, float]) -> None:
        """End it here."""
        self.asked = int(row["step"])
        if self.kills and self.asked == self.last:
            raise Killed

    def stop_requested(self) -> bool:
        """Asked during the step after the last one that was reported."""
        return not self.kills and self.asked + 1 == self.last


def attempts(path: str) -> list[str]:
    """Be the rank of all attempts; return how each ended."""
    run_module.REPORT_EVERY_S = 0.0  # every step is reported: attempts end at a step, not a time
    job = load(path)
    storage = Storage.at(str(Path(job.output.output_dir) / "checkpoints"))
    ended = []
    for start in range(STARTS):
        last = 3 * start + 5 if start < STARTS - 1 else LAST + 1
        run = Run(
            torch.device("cpu"),
            storage,
            "out_001",
            Ending(last, kills=start % 2 == 0),
            dist.new_group(backend="gloo"),
            restarts=start,
        )
        try:
            train(job, run, export_model)
            ended.append("done")
        except (Killed, Stopped) as error:
            ended.append(type(error).__name__)
        run.close()
        gc.collect()  # a killed process leaves no thread that writes on
        for thread in threading.enumerate():
            if thread.name.startswith("checkpoint"):
                thread.join(20)
    return ended


@pytest.mark.slow
def test_a_run_that_was_restarted_twenty_times_is_consistent_with_no_step_twice(
    job_file, tmp_path, capsys
):
    """It is killed or stopped, in turns; losses, evaluations and checkpoints are one run's."""
    keys = {
        "max_steps": LAST,
        "use_cpu": True,
        "save_strategy": "steps",
        "save_steps": EVERY,
        "save_total_limit": KEPT,
        "val_size": 4,
        "eval_strategy": "steps",
        "eval_steps": 7,
    }
    whole = tmp_path / "whole"
    run_ranks(_undisturbed, 1, tmp_path, str(job_file("whole.yaml", output_dir=str(whole), **keys)))
    path = job_file(**keys)
    output = open_output(load(path))
    (ended,) = run_ranks(attempts, 1, tmp_path, str(path))
    assert ended == ["Killed", "Stopped"] * 10 + ["done"]
    rows = [json.loads(line) for line in (output.folder / "metrics.jsonl").read_text().splitlines()]
    trained = [row["step"] for row in rows if row["kind"] == "train"]
    assert trained == list(range(1, LAST + 1))
    assert losses(output.folder) == losses(whole)
    assert [row["step"] for row in rows if row["kind"] == "eval"] == list(range(7, LAST + 1, 7))
    assert [row["restarts"] for row in rows if row.get("event") == "plan"] == list(range(STARTS))
    resumed = [row["step"] for row in rows if row.get("event") == "resume"]
    assert resumed == sorted(resumed) and len(resumed) == STARTS - 1
    found = [find(folder) for _, _, folder in all_folders(output.storage)]
    assert len(found) == KEPT and None not in found
    record.write(started(load(path), "out"), output.folder)
    output.note(load(path), "done", 1)
    assert show(output.folder, fix=False), capsys.readouterr().out


def _undisturbed(path: str) -> None:
    job = load(path)
    storage = Storage.at(str(Path(job.output.output_dir) / "checkpoints"))
    cpu = torch.device("cpu")
    train(job, Run(cpu, storage, "out_001", SilentReporter(), dist.new_group()), export_model)
