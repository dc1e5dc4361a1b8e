"""report_to: the run's figures in TensorBoard, Weights & Biases or MLflow, besides metrics.jsonl.

Secrets and addresses come from the environment of the workers (WANDB_API_KEY, WANDB_MODE,
MLFLOW_TRACKING_URI, ...), never from the job.
"""

import difflib
import importlib
import importlib.util
import json
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from raytrain_adv.config.job import JobConfig
from raytrain_adv.errors import JobError
from raytrain_adv.redaction import redact
from raytrain_adv.storage.metrics_file import plain_row

FOLDER = "trackers"
"""Folder in output_dir for what trackers write."""
STATE_FILE = "runs.json"
CLOSE_TIMEOUT_S = 60.0
NOT_METRICS = frozenset({"kind", "step", "time", "non_finite"})

# Any one of these modules does, the first that is there.
PACKAGES = {
    "tensorboard": ("tensorboardX", "torch.utils.tensorboard"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}
INSTALL = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
Emit = Callable[[str, str], None]
"""Takes an event's slug and its sentence, as MetricsFile.event does."""


class Tracker(Protocol):
    """One open run of one tracker."""

    name: str
    failures: tuple[type[BaseException], ...]
    """What its calls raise when the outside world fails: network, server, disk."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Send figures of a step."""

    def close(self) -> None:
        """Send what is left and end the run."""


def names(report_to: str | Sequence[str]) -> tuple[str, ...]:
    """Return the trackers that report_to names.

    Raises:
        JobError: naming what is no tracker, and the nearest that is.
    """
    listed = report_to.split(",") if isinstance(report_to, str) else report_to
    wanted = [name.strip() for name in listed if name.strip()]
    if wanted == ["none"]:
        return ()
    for name in wanted:
        if name not in PACKAGES:
            raise JobError("report_to names an unknown tracker", repr(name), _advice(name))
    return tuple(dict.fromkeys(wanted))


def check(report_to: str | Sequence[str]) -> None:
    """Raise if a tracker is unknown, or its package is not installed here; nothing is imported.

    Raises:
        JobError: naming the tracker and what to install.
    """
    for name in names(report_to):
        if not any(_is_installed(package) for package in PACKAGES[name]):
            raise JobError(
                f"report_to asks for {name}, whose package is not installed",
                f"no module {' or '.join(PACKAGES[name])}",
                f"pip install {INSTALL[name]} on the driver and the workers, or take {name} out",
            )


class Trackers:
    """The open trackers of rank 0; without any it does nothing.

    Rows are sent by a thread of their own: a server that is slow or away neither stalls nor ends
    training. The first failure of a tracker is told (event `tracker_failed`), later rows are still
    tried, and closing tells how many were lost (event `tracker_lost_rows`).
    """

    def __init__(self, trackers: tuple[Tracker, ...] = (), emit: Emit | None = None) -> None:
        self._trackers = trackers
        self._emit = emit or _emit_to_log
        self._rows: queue.SimpleQueue[tuple[dict[str, float], int] | None] = queue.SimpleQueue()
        self._news: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._lost = {tracker.name: 0 for tracker in trackers}
        self._thread = threading.Thread(target=self._send_rows, name="trackers", daemon=True)
        if trackers:
            self._thread.start()

    def log(self, row: Mapping[str, object], step: int) -> None:
        """Hand on the numbers of a row as <kind>/<key>; returns at once."""
        self._tell_news()
        if not self._trackers:
            return
        kind = row.get("kind", "train")
        figures = {
            f"{kind}/{key}": float(value)
            for key, value in plain_row(row).items()
            if key not in NOT_METRICS and isinstance(value, int | float)
        }
        self._rows.put((figures, step))

    def close(self) -> None:
        """Send what is left, for a minute at most, and end the runs; again is nothing."""
        if not self._trackers:
            return
        self._rows.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            names_open = ", ".join(tracker.name for tracker in self._trackers)
            message = f"Still sending after {CLOSE_TIMEOUT_S:.0f} s, left: {names_open}."
            self._news.put(("tracker_lost_rows", message))
        for name, num_lost in self._lost.items():
            if num_lost:
                message = f"{name} lacks {num_lost} rows of this run; metrics.jsonl has them."
                self._news.put(("tracker_lost_rows", message))
        self._tell_news()
        self._trackers = ()

    def _send_rows(self) -> None:
        while (item := self._rows.get()) is not None:
            figures, step = item
            for tracker in self._trackers:
                self._attempt(tracker, partial(tracker.log, figures, step))
        for tracker in self._trackers:
            self._attempt(tracker, tracker.close)

    def _attempt(self, tracker: Tracker, action: Callable[[], None]) -> None:
        try:
            action()
        except tracker.failures as error:
            if not self._lost[tracker.name]:
                message = f"{tracker.name} failed ({_one_line(error)}); training goes on."
                self._news.put(("tracker_failed", message))
            self._lost[tracker.name] += 1

    def _tell_news(self) -> None:
        # In the caller's thread: the file that events go to has one writer.
        while not self._news.empty():
            self._emit(*self._news.get())


def open_trackers(
    job: JobConfig,
    run_name: str | None = None,
    config: Mapping[str, Any] | None = None,
    resume_step: int = 0,
    emit: Emit | None = None,
) -> Trackers:
    """Open the trackers that the job reports to; for rank 0, before training.

    Args:
        job: the job; run_name and the configuration to show come from it unless given.
        run_name: name of the run in the trackers.
        config: figures to show beside the run; secrets are hidden.
        resume_step: a run resumed at a step goes on in the tracker's run it began; 0 begins one.
        emit: takes events (slug, sentence); the log if none.

    Raises:
        JobError: when a tracker is unknown, not installed, or cannot be opened.
    """
    wanted = names(job.output.report_to)
    check(job.output.report_to)
    output_dir = Path(job.output.output_dir)
    run_name = run_name or job.output.run_name or output_dir.resolve().name
    shown = redact(job.flat() if config is None else config)
    folder = output_dir / FOLDER
    run_ids = _read_ids(folder) if resume_step else {}
    trackers: list[Tracker] = []
    if wanted:
        folder.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        opened = _OPENERS[name](folder, run_name, shown, resume_step, run_ids.get(name))
        trackers.append(opened)
        run_ids[name] = opened.run_id
    if wanted:
        (folder / STATE_FILE).write_text(json.dumps(run_ids))
    return Trackers(tuple(trackers), emit)


class TensorBoard:
    """TensorBoard event files in output_dir/trackers/tensorboard."""

    name = "tensorboard"
    failures: tuple[type[BaseException], ...] = (OSError,)
    run_id = ""

    def __init__(
        self,
        folder: Path,
        run_name: str,
        config: dict[str, Any],
        resume_step: int,
        run_id: str | None,
    ) -> None:
        writer = _module("tensorboard").SummaryWriter
        # Steps after the one that is resumed from are computed again; TensorBoard hides the old
        # ones.
        purge = resume_step + 1 if resume_step else None
        try:
            self._writer = writer(str(folder / "tensorboard"), purge_step=purge)
        except OSError as error:
            fix = "check that output_dir can be written to"
            raise _cannot_open(self.name, error, fix) from error
        if not resume_step:
            self._writer.add_text("job", f"```\n{json.dumps(config, indent=1)}\n```", 0)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Write the figures, so that they can be seen at once."""
        for key, value in figures.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class Wandb:
    """A Weights & Biases run; its environment holds, as WANDB_PROJECT and WANDB_MODE=offline."""

    name = "wandb"

    def __init__(
        self,
        folder: Path,
        run_name: str,
        config: dict[str, Any],
        resume_step: int,
        run_id: str | None,
    ) -> None:
        wandb = _module("wandb")
        self.failures: tuple[type[BaseException], ...] = (wandb.errors.Error, OSError)
        try:
            self._run = wandb.init(
                name=run_name,
                config=config,
                dir=str(folder),
                id=run_id,
                resume="allow" if run_id else None,
            )
        except self.failures as error:
            fix = "set WANDB_API_KEY or WANDB_MODE=offline in the environment of the workers"
            raise _cannot_open(self.name, error, fix) from error
        self.run_id = str(self._run.id)
        # With wandb's own step, which only rises, the steps that a resumed run repeats would be
        # dropped.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Hand the figures to wandb's own process."""
        self._run.log({**figures, "step": step})

    def close(self) -> None:
        """Wait until wandb has sent everything."""
        self._run.finish()


class Mlflow:
    """An MLflow run; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME hold."""

    name = "mlflow"

    def __init__(
        self,
        folder: Path,
        run_name: str,
        config: dict[str, Any],
        resume_step: int,
        run_id: str | None,
    ) -> None:
        mlflow = _module("mlflow")
        error_type = mlflow.exceptions.MlflowException
        self.failures: tuple[type[BaseException], ...] = (error_type, OSError)
        try:
            run = mlflow.start_run(run_id=run_id, run_name=None if run_id else run_name)
            if not run_id:
                # MLflow takes values of up to 6,000 characters.
                mlflow.log_params({key: str(value)[:6000] for key, value in config.items()})
            # Leave MLflow's "current run": it is this thread's, and figures go out from another.
            mlflow.end_run()
            self._client = mlflow.MlflowClient()
            self._client.update_run(run.info.run_id, status="RUNNING")
        except self.failures as error:
            fix = "set MLFLOW_TRACKING_URI, in the environment of the workers, to a store in reach"
            raise _cannot_open(self.name, error, fix) from error
        self.run_id = str(run.info.run_id)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Send the figures."""
        for key, value in figures.items():
            self._client.log_metric(self.run_id, key, value, step=step)

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self.run_id)


_OPENERS: dict[str, Callable[..., Any]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
}


def _advice(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), [*PACKAGES, "none"], n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"{meant}report_to takes {', '.join(PACKAGES)} or none"


def _is_installed(package: str) -> bool:
    # torch.utils.tensorboard is there in every torch; what it needs is the tensorboard package.
    module = "tensorboard" if package == "torch.utils.tensorboard" else package
    return importlib.util.find_spec(module) is not None


def _module(name: str) -> Any:
    package = next(package for package in PACKAGES[name] if _is_installed(package))
    return importlib.import_module(package)


def _cannot_open(name: str, error: BaseException, fix: str) -> JobError:
    fix = f"{fix}, or take {name} out of report_to"
    return JobError(f"{name} cannot be opened", _one_line(error), fix)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _read_ids(folder: Path) -> dict[str, str]:
    try:
        ids: dict[str, str] = json.loads((folder / STATE_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        # The run did not report to anything before, or was killed as it began to: it begins there.
        return {}
    return ids


def _emit_to_log(event: str, message: str) -> None:
    logging.getLogger(__name__).warning("%s: %s", event, message)
