"""The results of a sweep's trials: compared, printed, and written to sweep.json and sweep.html."""

import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from ray import tune

from raytrain_adv import text as numbers
from raytrain_adv.config.job import JobConfig
from raytrain_adv.config.sweep import SET_BY_THE_SWEEP, Sweep
from raytrain_adv.driver.cluster.nodes import release_workers
from raytrain_adv.driver.output import output_dir
from raytrain_adv.driver.output.replaced import Replaced
from raytrain_adv.driver.training.console import printable
from raytrain_adv.driver.training.job_message import JobMessage
from raytrain_adv.redaction import hide_environment
from raytrain_adv.report import record, sweep_record
from raytrain_adv.report.build import command_line
from raytrain_adv.report.record import write_text
from raytrain_adv.report.sweep_html import figure, write_html
from raytrain_adv.report.sweep_record import SweepReport, TrialReport
from raytrain_adv.storage.storage import Storage

BEST_JOB = "best_job.yaml"


class Results:
    """The sweep's report, updated from the reports in the trials' folders."""

    def __init__(self, job: JobConfig, sweep: Sweep, replaced: Replaced, began: float) -> None:
        self._job = job
        self._sweep = sweep
        self._replaced = replaced
        self._trials = {t.name: t for t in sweep.trials}
        self._died: dict[str, str] = {}  # trial -> why its process died without a report of it
        self._begun: set[str] = set()
        by = sweep_record.ranked_by(sweep)
        compared = [f"Trials are compared by {by}."] if by != sweep.metric else []
        self.report = SweepReport(
            status="running",
            name=job.run_name,
            command=command_line(),
            job_file=job.source,
            output_dir=job.output.output_dir,
            started_at=began,
            keys=sweep.keys,
            metric=sweep.metric,
            mode=sweep.mode,
            scheduler=sweep.options.scheduler,
            trials=tuple(self._read(name) for name in self._trials),
            notes=(*job.notes, *compared),
        )

    @property
    def best(self) -> TrialReport | None:
        """The best trial so far."""
        return sweep_record.best(self.report.trials, self.report.mode)

    def has_ended(self, name: str) -> bool:
        """Whether an earlier launch ended the trial; without a scheduler stopped ones continue."""
        ended = ("done",) if self._sweep.options.scheduler == "none" else ("done", "stopped")
        return self.report.trial(name).status in ended

    def begin(self, at_once: int) -> None:
        """Record that trials start, and delete what they replace. Raises StorageError."""
        if self._replaced.is_there:
            print(self._replaced.clear())
        self._write(max_concurrent_trials=at_once)

    def started(self, name: str) -> None:
        """Record that a trial runs."""
        self._begun.add(name)
        self._write(trial=self.report.trial(name).model_copy(update={"status": "running"}))

    def ended(self, name: str, error: BaseException | None) -> TrialReport:
        """Record that a trial has ended; `error` is why its process died, if it did."""
        if error is not None:
            self._died[name] = hide_environment(str(error)).strip().splitlines()[-1]
            # Its driver has died and cannot release its workers' resources.
            release_workers()
        one = self._read(name)
        self._write(trial=one)
        if self._sweep.options.keep_models == "best":
            self._delete_models()
        return one

    def finish(self) -> None:
        """Compare the trials; write the best one's job."""
        best = self.best
        update: dict[str, Any] = {}
        if best is not None:
            path = Path(self._job.output.output_dir) / BEST_JOB
            write_text(self._best_job(best), path)
            update = {"best": best.name, "best_job": str(path)}
        self._write(status="done", finished_at=time.time(), **update)

    def fail(self, error: BaseException) -> None:
        """Record what ended the sweep, unless the sweep that it replaces is still there."""
        if self._replaced.is_there:
            print(f"\n{self._replaced.keep()}")
            return
        text = str(error) or type(error).__name__
        if isinstance(error, KeyboardInterrupt):
            text = "The sweep was stopped by Ctrl-C"
        self._begun.clear()  # none runs any more; a later launch continues them
        trials = tuple(self._read(name) for name in self._trials)
        self._write(status="failed", finished_at=time.time(), error=text, trials=trials)

    def describe(self, value: float | None) -> str:
        """Return a value of the metric with its name."""
        return f"{self.report.metric} {figure(self.report.metric, value)}"

    def _read(self, name: str) -> TrialReport:
        trial = self._trials[name]
        folder = trial.job.output.output_dir
        is_there = (Path(folder) / record.FILE_NAME).exists() and not self._replaced.is_there
        run = record.read(folder) if is_there else None
        one = sweep_record.trial_report(trial, run, self._sweep.metric)
        update = {}
        if one.status == "running" and name not in self._begun:
            update = {"status": "waiting"}  # its driver was killed
        elif name in self._died and one.status in ("running", "waiting"):
            update = {"status": "failed", "error": self._died[name]}
        elif one.status == "done" and one.metric is None:
            why = f"it ended without a finite value of {self._sweep.metric}"
            update = {"status": "failed", "error": why}
        return one.model_copy(update=update)

    def _delete_models(self) -> None:
        best = self.best
        for one in self.report.trials:
            if one.status in ("done", "stopped") and best is not None and one.name != best.name:
                for model in output_dir.WEIGHTS:
                    shutil.rmtree(Path(one.output_dir) / model, ignore_errors=True)
                Storage.at(output_dir.storage_path(self._trials[one.name].job)).delete()
                self._write(trial=one.model_copy(update={"model_dir": None}))

    def _write(self, trial: TrialReport | None = None, **update: object) -> None:
        if trial is not None:
            named = {t.name: t for t in self.report.trials} | {trial.name: trial}
            update["trials"] = tuple(named.values())
        self.report = self.report.model_copy(update=update)
        sweep_record.write(self.report, self._job.output.output_dir)
        write_html(self.report, self._job.output.output_dir)

    def _best_job(self, best: TrialReport) -> str:
        first, own = self._job.given(), self._trials[best.name].job.given()
        keys = {k: v for k, v in own.items() if k not in SET_BY_THE_SWEEP}
        keys |= {k: v for k, v in first.items() if k in SET_BY_THE_SWEEP}
        keys.pop("resume_from_checkpoint", None)
        keys["output_dir"] = str(Path(self._job.output.output_dir) / "best")
        for key, value in keys.items():
            keys[key] = int(value) if isinstance(value, float) and value.is_integer() else value
        return (
            f"# The best of {len(self.report.trials)} trials of {self._job.source}: "
            f"{self.describe(best.metric)}\n"
            f"# with {best.name}; its own run is in {best.output_dir}.\n"
            + yaml.safe_dump(keys, sort_keys=False, allow_unicode=True, width=100)
        )


class Progress(tune.Callback):  # type: ignore[misc] # ray is Any to mypy
    """Prints each start, evaluation and end of a trial, and keeps the results and the message of a
    submitted job up to date.
    """

    def __init__(self, results: Results, num_trials: int) -> None:
        self._results = results
        self._num_trials = num_trials
        self._num_started = 0
        self._began = time.monotonic()
        self._running: dict[str, str] = {}  # trial -> where it is
        self._job_message = JobMessage(partial(print, flush=True))

    def on_trial_start(self, *, trial: Any, **info: Any) -> None:
        """Print that a trial starts."""
        self._num_started += 1
        self._results.started(_name(trial))
        self._running[_name(trial)] = "started"
        self._print(trial, f"started ({self._num_started} of {self._num_trials})")

    def on_trial_result(self, *, trial: Any, result: Mapping[str, Any], **info: Any) -> None:
        """Print a trial's step and loss."""
        if line := describe_result(result):
            self._running[_name(trial)] = line
            self._print(trial, line)

    def on_trial_complete(
        self, *, trial: Any, error: BaseException | None = None, **info: Any
    ) -> None:
        """Print how a trial ended; `error` is why its process died, or that its code failed."""
        one = self._results.ended(_name(trial), error)
        self._running.pop(_name(trial), None)
        if one.status == "done":
            self._print(trial, f"done, {self._results.describe(one.metric)}")
        else:
            first = (one.error or "").partition("\n")[0]
            self._print(trial, f"{one.status} after {numbers.plural(one.steps, 'step')}: {first}")

    def on_trial_error(self, *, trial: Any, **info: Any) -> None:
        """Print that a trial's process died, or that its code failed."""
        self.on_trial_complete(trial=trial, error=trial.get_error())

    def _print(self, trial: Any, text: str) -> None:
        line = f"[{numbers.clock(time.monotonic() - self._began)}] {_name(trial)}: {text}"
        print(printable(line, sys.stdout.encoding), flush=True)
        self._job_message.tell(sentence(self._results.report, self._running))


def sentence(report: SweepReport, running: Mapping[str, str]) -> str:
    """Return where a sweep is: how many trials have ended, the best, and those that run."""
    count = Counter(trial.status for trial in report.trials)
    ended = len(report.trials) - count["running"] - count["waiting"]
    parts = [f"{ended} of {numbers.plural(len(report.trials), 'trial')} ended"]
    parts += [f"{count[s]} {s}" for s in ("failed", "stopped") if count[s]]
    if (best := sweep_record.best(report.trials, report.mode)) is not None:
        parts.append(f"best {report.metric} {figure(report.metric, best.metric)} ({best.name})")
    return "; ".join([", ".join(parts), *(f"{name}: {where}" for name, where in running.items())])


def describe_result(result: Mapping[str, Any]) -> str:
    """Return what a trial reported as a line; empty for its end, which has a line of its own."""
    if "step" not in result:
        return ""
    total, phase = result.get("total_steps"), result.get("phase", "training")
    of_total = f" of {total:,}" if total else ""
    loss = result["value"] if "value" in result else result.get("loss")
    parts = [f"step {result['step']:,}{of_total}"]
    parts += [f"loss {numbers.loss(loss)}"] if "value" in result or loss is not None else []
    parts += [f"{numbers.clock(result['eta'])} left"] if result.get("eta") else []
    parts += [phase] if phase != "training" else []
    return ", ".join(parts)


def _name(trial: Any) -> str:
    return str(trial.config["trial"])
