"""One trial of a sweep, in a process of Ray Tune: a usual run, with its losses reported to Tune."""

import os
import threading
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from ray import tune

from raytrain_adv.config.job import JobConfig
from raytrain_adv.driver.training import run
from raytrain_adv.driver.training.console import Progress
from raytrain_adv.driver.watch.stop import clear_trial_stop
from raytrain_adv.errors import RaytrainAdvError
from raytrain_adv.redaction import hide_environment
from raytrain_adv.storage.metrics_file import FILE_NAME, FollowedFile

CONSOLE_FILE = "console.log"  # the trial's console output
POLL_S = 0.5
TELL_S = 15.0
"""Longest time between two lines about a trial."""


def run_trial(config: Mapping[str, str], jobs: Mapping[str, JobConfig], cwd: str, row: str) -> None:
    """Run the trial that `config` names. `cwd` is the driver's folder for relative paths, and `row`
    the kind of the rows of metrics.jsonl whose loss is reported to Tune: eval or train.
    """
    os.chdir(cwd)
    job = jobs[config["trial"]]
    folder = Path(job.output.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    clear_trial_stop(folder)
    errors: list[BaseException] = []
    thread = threading.Thread(target=_run, args=(job, folder, errors), name="trial", daemon=True)
    thread.start()
    rows = FollowedFile(folder / FILE_NAME)
    progress, told_at = Progress(), time.monotonic()
    has_ended = False
    while not has_ended:
        thread.join(POLL_S)
        has_ended = not thread.is_alive()  # before the last rows are read
        for found in rows.new_rows():
            progress.take(found)
            if found["kind"] == row:
                loss = {"step": found["step"], "value": found.get("loss")}
                tune.report({**loss, "total_steps": progress.total_steps, "eta": progress.eta_s()})
                told_at = time.monotonic()
        if not has_ended and time.monotonic() - told_at >= TELL_S:
            tune.report(where_it_is(progress))
            told_at = time.monotonic()
    for error in errors:
        if not isinstance(error, RaytrainAdvError):
            raise error
    tune.report({"ended": True, "error": str(errors[0]) if errors else None})


def where_it_is(progress: Progress) -> dict[str, Any]:
    """Return what a line about a trial says between its evaluations."""
    last = next((one for one in reversed(progress.shown) if one["kind"] == "train"), {})
    return {
        "step": progress.step,
        "total_steps": progress.total_steps,
        "loss": last.get("loss"),
        "eta": progress.eta_s(),
        "phase": progress.phase,
    }


def _run(job: JobConfig, folder: Path, errors: list[BaseException]) -> None:
    with (folder / CONSOLE_FILE).open("a", encoding="utf-8") as log, redirect_stdout(log):
        try:
            run.run(job)
        except BaseException as error:  # noqa: BLE001 # raised or reported by the trial's own thread
            errors.append(error)
            print(f"\n{hide_environment(str(error))}")
