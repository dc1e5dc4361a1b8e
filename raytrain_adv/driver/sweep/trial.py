"""One trial of a sweep, in a process of its own that Ray Tune starts: the same line as a single
run's, and its losses told to Tune as they come.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path

from ray import tune

from raytrain_adv.config.job import JobConfig
from raytrain_adv.driver.training import trainer
from raytrain_adv.driver.watch.stop import take_back
from raytrain_adv.errors import RaytrainAdvError
from raytrain_adv.library_noise import quieten
from raytrain_adv.redaction import hide_environment
from raytrain_adv.storage.metrics_file import FILE_NAME, FollowedFile

CONSOLE_FILE = "console.log"
"""What a launch of the trial by itself would have printed."""
POLL_S = 0.5


def run_trial(config: Mapping[str, str], jobs: Mapping[str, JobConfig], cwd: str, row: str) -> None:
    """Run a trial to its end.

    Args:
        config: `trial` is its name.
        jobs: name -> job.
        cwd: the driver's folder, from which relative paths count.
        row: kind of the rows of metrics.jsonl whose loss is told to Tune: eval or train.
    """
    quieten()
    os.chdir(cwd)
    job = jobs[config["trial"]]
    folder = Path(job.output.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    take_back(folder)
    errors: list[BaseException] = []
    line = threading.Thread(target=_run_line, args=(job, folder, errors), name="trial", daemon=True)
    line.start()
    rows = FollowedFile(folder / FILE_NAME)
    total_steps = None
    while True:
        line.join(POLL_S)
        ended = not line.is_alive()
        for found in rows.new_rows():
            total_steps = found.get("total_steps", total_steps)
            if found["kind"] == row:
                told = {"step": found["step"], "value": found.get("loss")}
                tune.report({**told, "total_steps": total_steps})
        if ended:
            break
    for error in errors:
        if not isinstance(error, RaytrainAdvError):
            raise error
    tune.report({"ended": True, "error": str(errors[0]) if errors else None})


def _run_line(job: JobConfig, folder: Path, errors: list[BaseException]) -> None:
    """Run the job; what ends it is left in `errors`."""
    with (folder / CONSOLE_FILE).open("a", encoding="utf-8") as log, redirect_stdout(log):
        try:
            trainer.run(job)
        except BaseException as error:  # it is raised again, or told, on the trial's own thread
            errors.append(error)
            print(f"\n{hide_environment(str(error))}")
