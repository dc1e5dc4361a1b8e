"""A day of a run in accelerated steps, with restarts, evaluations and saves: what a process holds
stays flat.

python -m tests.soak --hours 24 --out jobs/benchmarks/results/soak.json

A step stands for STEP_S of a large model's. A simulated hour is an attempt, at whose end the run is
stopped or killed in turns; one process does them all, so that nothing is freed by its end. It is
measured after each: resident memory, open files, threads, sockets, the checkpoints' files.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from raytrain_adv.config import load
from raytrain_adv.driver.output.output_dir import open_output
from raytrain_adv.driver.training.console import Console
from raytrain_adv.errors import Stopped
from raytrain_adv.export.model_folder import export_model
from raytrain_adv.run import run as run_module
from raytrain_adv.run.run import Run, SilentReporter
from raytrain_adv.worker.train import train
from tests.conftest import tiny_keys

STEP_S = 5
STEPS_EACH = 3600 // STEP_S
MOST_GROWTH_MIB = 24.0
"""Of resident memory in all hours, by the slope: allocators keep some pages, and metrics of a step
take 100 bytes."""
KEYS: dict[str, Any] = {
    "use_cpu": True,
    "max_steps": 10_000_000,
    "num_train_epochs": 1,
    "save_strategy": "steps",
    "save_steps": 50,  # ten times as often as by default
    "save_total_limit": 2,
    "val_size": 8,
    "eval_strategy": "steps",
    "eval_steps": 50,
    "logging_steps": 10,
    "export_model": False,
}


class Killed(RuntimeError):
    """Stands for a SIGKILL after a step's row was written."""


class Ending(SilentReporter):
    """Ends an attempt after STEPS_EACH steps: in the middle of things, or with a checkpoint."""

    def __init__(self, kills: bool) -> None:
        self.kills, self.steps, self.last = kills, 0, 0

    def metrics(self, row: dict[str, float]) -> None:
        """Kill it here."""
        self.last = int(row["step"])
        if self.kills and self.steps >= STEPS_EACH:
            raise Killed

    def stop_requested(self) -> bool:
        """Be asked in each step."""
        self.steps += 1
        return not self.kills and self.steps >= STEPS_EACH


def measured(out: Path) -> dict[str, float]:
    """Return what this process holds."""
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("checkpoint"):
            thread.join(20)  # a killed process would leave none
    me = psutil.Process()
    checkpoints = [file for file in (out / "checkpoints").rglob("*") if file.is_file()]
    return {
        "resident_mib": round(me.memory_info().rss / 2**20, 1),
        "files": me.num_fds(),
        "threads": me.num_threads(),
        "sockets": len(me.net_connections()),
        "checkpoint_files": len(checkpoints),
    }


def soak(folder: Path, hours: int) -> list[dict[str, float]]:
    """Run an attempt for each simulated hour; return a measurement after each."""
    run_module.REPORT_EVERY_S = 0.0
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({**tiny_keys(folder), **KEYS}))
    job = load(path)
    output = open_output(job)
    found: list[dict[str, float]] = []
    began = time.monotonic()
    with Path(os.devnull).open("w") as nowhere:
        for hour in range(1, hours + 1):
            reporter = Ending(kills=hour % 2 == 1)
            run = Run(torch.device("cpu"), output.storage, output.attempt, reporter, restarts=hour)
            try:
                with Console(output.folder, stream=nowhere, poll_s=0.1):
                    train(job, run, export_model)
            except (Killed, Stopped):
                pass
            finally:
                run.close()
            del run
            minutes = round((time.monotonic() - began) / 60, 2)
            at = {"hour": hour, "step": reporter.last, "minutes": minutes}
            found.append({**at, **measured(output.folder)})
            print(json.dumps(found[-1]), flush=True)
    return found


def growth(found: list[dict[str, float]]) -> dict[str, float]:
    """Return by how much each figure grows in all hours at the median slope between two of its
    measurements, those of the first sixth left out (Theil and Sen).
    """
    warm = found[len(found) // 6 :]
    pairs = list(itertools.combinations(warm, 2))
    names = [name for name in found[0] if name not in ("hour", "step", "minutes")]
    slopes = {
        name: statistics.median((b[name] - a[name]) / (b["hour"] - a["hour"]) for a, b in pairs)
        for name in names
    }
    return {name: round(slope * found[-1]["hour"], 2) for name, slope in slopes.items()}


def grown(by: dict[str, float]) -> list[str]:
    """Return the names of what has grown."""
    limits = {"resident_mib": MOST_GROWTH_MIB}
    return [name for name, value in by.items() if value > limits.get(name, 0.5)]


def main() -> int:
    """Return 0 if everything stayed flat."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--hours", type=int, default=24)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        found = soak(Path(folder), given.hours)
    by = growth(found)
    result = {
        "command": f"make test-soak HOURS={given.hours}",
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "steps": found[-1]["step"],
        "hours": given.hours,
        "minutes": found[-1]["minutes"],
        "growth": by,
        "measured": found,
    }
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{found[-1]['step']:,} steps in {given.hours} simulated hours; growth {by}")
    return 1 if grown(by) else 0


if __name__ == "__main__":
    sys.exit(main())
