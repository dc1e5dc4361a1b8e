"""sweep.json: the trials of a sweep and their results; a contract that scripts read."""

from pathlib import Path
from typing import Literal

from raytrain_adv.config.sweep import CONVERTED_LOSS, KNOWN_EARLY, MetricName, Sweep, Trial
from raytrain_adv.report.parts import Arguments, JsonObject, Number, Record
from raytrain_adv.report.record import RunReport, write_text

FILE_NAME = "sweep.json"
STOPPED = "StoppedBySweep"
"""Kind of failure in the report of a trial that its sweep stopped."""


class TrialReport(Record):
    """One trial. Its own report, with every curve, is in output_dir/report.json."""

    name: str
    """Its swept keys with their values; the name of its folder."""
    values: JsonObject
    """Each swept key's value."""
    status: Literal["waiting", "running", "done", "stopped", "failed"]
    """stopped: by the scheduler, before its end; failed: it ended in an error."""
    metric: Number = None
    """The sweep's metric of the model that it exports; null unless it is done."""
    error: str | None = None
    """Why it was stopped or failed, as a user of a single run would see it."""
    output_dir: str
    """Folder of its run: report, metrics, model."""
    model_dir: str | None = None
    """Folder of its trained model; null if there is none, or keep_models has deleted it."""
    steps: int = 0
    """Optimizer steps that were finished."""
    total_steps: int | None = None
    """Optimizer steps that its plan has."""
    train_loss: Number = None
    """Training loss of the last logged step."""
    eval_loss: Number = None
    """Last loss on the held-out rows."""
    quantized_eval_loss: Number = None
    """Loss of the converted model on the held-out rows; null without one."""
    tokens_per_second_per_worker: Number = None
    """Median after warm-up."""
    step_seconds: Number = None
    """Median time of an optimizer step after warm-up."""
    peak_memory_gib: Number = None
    """As in its report."""
    mfu_bf16: Number = None
    """As in its report."""
    seconds: Number = None
    """From the start of its last launch to its end."""
    resumed_from_step: int | None = None
    """Step of the checkpoint it last resumed from; null if it never did."""


class SweepReport(Record):
    """The contract of sweep.json."""

    format_version: Literal[1] = 1
    """Version of this contract; raised when a field changes its meaning or is removed."""
    status: Literal["running", "done", "failed"]
    """running is written while trials run: if it stays, the driver was killed. done: a trial has a
    value of the metric.
    """
    error: str | None = None
    """The error's whole message as the user saw it; null unless status is failed."""
    name: str = ""
    """Name of the sweep."""
    command: Arguments = ""
    """The command that started it."""
    job_file: str = ""
    """Path of the job file on the driver."""
    output_dir: str = ""
    """Folder of the sweep."""
    started_at: Number = None
    """When the launch command began, in unix seconds."""
    finished_at: Number = None
    """When the sweep ended, in unix seconds."""
    keys: tuple[str, ...]
    """The swept keys."""
    metric: MetricName
    """The figure that trials are compared by; a field of TrialReport describes it."""
    mode: Literal["min", "max"]
    """Whether the lowest or the highest value is the best."""
    scheduler: Literal["none", "asha"] = "none"
    """asha stops trials early."""
    max_concurrent_trials: int | None = None
    """Trials that were run at the same time."""
    trials: tuple[TrialReport, ...]
    """Every trial, in the order of the section's values."""
    best: str | None = None
    """Name of the best trial that is done."""
    best_job: str | None = None
    """Path of the best trial's job, ready to run."""
    notes: tuple[str, ...] = ()
    """Anything else a reader should know, one sentence each."""

    def trial(self, name: str) -> TrialReport:
        """Return the trial of this name."""
        return next(t for t in self.trials if t.name == name)


def metrics(report: RunReport, step: int | None = None) -> dict[MetricName, float | None]:
    """Return a run's value of each metric that trials can be compared by; losses up to a step."""
    return {
        "eval_loss": _last(report.eval_loss, step),
        CONVERTED_LOSS: report.quantized_eval_loss,
        "train_loss": _last(report.train_loss, step),
        "tokens_per_second_per_worker": report.tokens_per_second_per_worker,
        "step_seconds": report.step_seconds,
        "peak_memory_gib": report.peak_memory_gib,
        "mfu_bf16": report.mfu_bf16,
    }


def _last(points: tuple[tuple[int, float | None], ...], until: int | None) -> float | None:
    found = [value for step, value in points if until is None or step <= until]
    return found[-1] if found else None


def ranked_by(sweep: Sweep) -> str:
    """Return what trials are compared by, as a user reads it."""
    best = any(trial.job.output.load_best_model_at_end for trial in sweep.trials)
    of = " of the model that each exports (load_best_model_at_end)"
    return sweep.metric + (of if best and sweep.metric in KNOWN_EARLY else "")


def trial_report(trial: Trial, run: RunReport | None, metric: MetricName) -> TrialReport:
    """Return a trial's result from the report of its run; None means that it has not begun."""
    own = {"name": trial.name, "values": trial.values, "output_dir": trial.job.output.output_dir}
    if run is None:
        return TrialReport(**own, status="waiting")
    ended = "stopped" if run.failure is not None and run.failure.kind == STOPPED else "failed"
    figures = metrics(run)
    return TrialReport(
        **own,
        **figures,
        status=ended if run.status in ("stopped", "failed") else run.status,
        metric=metrics(run, run.best_step)[metric] if run.status == "done" else None,
        error=run.error,
        model_dir=run.model_dir if run.model_dir and Path(run.model_dir).is_dir() else None,
        steps=run.steps,
        total_steps=run.total_steps,
        seconds=run.seconds,
        resumed_from_step=run.resumed_from_step,
    )


def best(trials: tuple[TrialReport, ...], mode: Literal["min", "max"]) -> TrialReport | None:
    """Return the trial with the best value; among equals, the first."""
    done = [t for t in trials if t.metric is not None]
    sign = 1 if mode == "min" else -1
    return min(done, key=lambda t: sign * (t.metric or 0.0), default=None)


def write(report: SweepReport, output_dir: str | Path) -> Path:
    """Write sweep.json and return its path. Raises StorageError if it cannot be written."""
    return write_text(report.model_dump_json(indent=2) + "\n", Path(output_dir) / FILE_NAME)
