"""One trial of a sweep, in a process of Ray Tune: a usual run, with its losses reported to Tune."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path

from ray import tune

from raytrain_adv.config.job import JobConfig
from raytrain_adv.driver.training import trainer
from raytrain_adv.driver.watch.stop import clear_trial_stop
from raytrain_adv.errors import RaytrainAdvError, quieten
from raytrain_adv.redaction import hide_environment
from raytrain_adv.storage.metrics_file import FILE_NAME, FollowedFile

CONSOLE_FILE = "console.log"  # the trial's console output
POLL_S = 0.5


def run_trial(config: Mapping[str, str], jobs: Mapping[str, JobConfig], cwd: str, row: str) -> None:
    """Run the trial that `config` names. `cwd` is the driver's folder for relative paths, and `row`
    the kind of the rows of metrics.jsonl whose loss is reported to Tune: eval or train.
    """
    quieten()
    os.chdir(cwd)
    job = jobs[config["trial"]]
    folder = Path(job.output.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    clear_trial_stop(folder)
    errors: list[BaseException] = []
    thread = threading.Thread(target=_run, args=(job, folder, errors), name="trial", daemon=True)
    thread.start()
    rows = FollowedFile(folder / FILE_NAME)
    total_steps = None
    has_ended = False
    while not has_ended:
        thread.join(POLL_S)
        has_ended = not thread.is_alive()  # before the last rows are read
        for found in rows.new_rows():
            total_steps = found.get("total_steps", total_steps)
            if found["kind"] == row:
                loss = {"step": found["step"], "value": found.get("loss")}
                tune.report({**loss, "total_steps": total_steps})
    for error in errors:
        if not isinstance(error, RaytrainAdvError):
            raise error
    tune.report({"ended": True, "error": str(errors[0]) if errors else None})


def _run(job: JobConfig, folder: Path, errors: list[BaseException]) -> None:
    with (folder / CONSOLE_FILE).open("a", encoding="utf-8") as log, redirect_stdout(log):
        try:
            trainer.run(job)
        except BaseException as error:  # raised or reported by the trial's own thread
            errors.append(error)
            print(f"\n{hide_environment(str(error))}")
