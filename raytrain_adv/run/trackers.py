"""report_to: the run's numbers in TensorBoard, Weights & Biases or MLflow, besides metrics.jsonl.

Secrets and addresses come from the environment of the workers (WANDB_API_KEY, WANDB_MODE,
MLFLOW_TRACKING_URI, ...), never from the job.
"""

import importlib
import importlib.util
import json
import logging
import operator
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from raytrain_adv.config.job import JobConfig
from raytrain_adv.errors import JobError
from raytrain_adv.redaction import redact
from raytrain_adv.storage.metrics_file import plain_row
from raytrain_adv.storage.storage import Storage
from raytrain_adv.text import ascii_name, plural

FOLDER = "trackers"  # folder in output_dir for what trackers write
STATE_FILE = "runs.json"
CLOSE_TIMEOUT_S = 60.0
NOT_METRICS = frozenset({"kind", "step", "time", "non_finite"})
Emit = Callable[[str, str], None]  # takes an event's slug and sentence, as MetricsFile.event


@dataclass(frozen=True)
class Start:
    """What a tracker's run begins with."""

    folder: Path
    run_name: str
    config: dict[str, Any]  # the job, without its secrets
    resume_step: int  # the step that is resumed from; 0 at a new run
    run_id: str | None  # the tracker's own id of the run that is continued


class Tracker(ABC):
    """One run in one tracker."""

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]  # modules of which the first one installed is used
    advice: ClassVar[str]  # what to do when it cannot be opened
    error: ClassVar[str] = ""  # its own exception, by its path in the module
    run_id: str = ""

    def __init__(self, module: Any) -> None:
        self.module = module
        own = (operator.attrgetter(self.error)(module),) if self.error else ()
        self.failures: tuple[type[BaseException], ...] = (*own, OSError)

    @abstractmethod
    def open(self, start: Start) -> None:
        """Start the run, or resume the one of start.run_id."""

    @abstractmethod
    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Send figures of a step."""

    @abstractmethod
    def close(self) -> None:
        """Send what is left and end the run."""


class _TensorBoard(Tracker):
    name = "tensorboard"
    packages = ("tensorboardX", "torch.utils.tensorboard")
    advice = "check that output_dir can be written to"

    def open(self, start: Start) -> None:
        # Later steps are computed again: TensorBoard hides their old values.
        purge = start.resume_step + 1 if start.resume_step else None
        # TensorBoard names a run by its folder: of several output_dirs below one --logdir, too.
        folder = str(start.folder / "tensorboard" / ascii_name(start.run_name).replace("/", "_"))
        self.writer = self.module.SummaryWriter(folder, purge_step=purge)
        if not start.resume_step:
            self.writer.add_text("job", f"```\n{json.dumps(start.config, indent=1)}\n```", 0)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for key, value in figures.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _Wandb(Tracker):
    """A Weights & Biases run; WANDB_PROJECT, WANDB_MODE and the like apply."""

    name = "wandb"
    packages = ("wandb",)
    advice = "set WANDB_API_KEY or WANDB_MODE=offline in the environment of the workers"
    error = "errors.Error"

    def open(self, start: Start) -> None:
        self.run = self.module.init(
            name=start.run_name,
            config=start.config,
            dir=str(start.folder),
            id=start.run_id,
            resume="allow" if start.run_id else None,
        )
        self.run_id = str(self.run.id)
        # wandb's own step only rises: it would drop the steps that a resumed run repeats.
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self.run.log({**figures, "step": step})

    def close(self) -> None:
        self.run.finish()


class _Mlflow(Tracker):
    """An MLflow run; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME apply."""

    name = "mlflow"
    packages = ("mlflow",)
    advice = "set MLFLOW_TRACKING_URI, in the environment of the workers, to a reachable store"
    error = "exceptions.MlflowException"

    def open(self, start: Start) -> None:
        run_id, mlflow = start.run_id, self.module
        run = mlflow.start_run(run_id=run_id, run_name=None if run_id else start.run_name)
        if not run_id:
            # MLflow takes values of up to 6,000 characters.
            mlflow.log_params({key: str(value)[:6000] for key, value in start.config.items()})
        # MLflow's "current run" belongs to this thread, and figures are sent by another one.
        mlflow.end_run()
        self.client = mlflow.MlflowClient()
        self.client.update_run(run.info.run_id, status="RUNNING")
        self.run_id = str(run.info.run_id)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for key, value in figures.items():
            self.client.log_metric(self.run_id, key, value, step=step)

    def close(self) -> None:
        self.client.set_terminated(self.run_id)


TRACKERS: dict[str, type[Tracker]] = {kind.name: kind for kind in (_TensorBoard, _Wandb, _Mlflow)}


def names(report_to: str | Sequence[str]) -> tuple[str, ...]:
    """Return the trackers that report_to names."""
    listed = [report_to] if isinstance(report_to, str) else report_to
    return tuple(name for name in listed if name != "none")


def check(report_to: str | Sequence[str]) -> None:
    """Raise JobError for a tracker that is not installed; import none."""
    for name in names(report_to):
        packages = TRACKERS[name].packages
        if not any(map(_is_installed, packages)):
            raise JobError(
                f"report_to enables {name}, whose package is not installed",
                f"no module {' or '.join(packages)}",
                f"pip install {packages[0]} on the driver and the workers, or take {name} out",
            )


def _is_installed(package: str) -> bool:
    # Every torch has torch.utils.tensorboard, which needs the tensorboard package.
    module = "tensorboard" if package == "torch.utils.tensorboard" else package
    return importlib.util.find_spec(module) is not None


class Trackers:
    """The open trackers of rank 0; without any it does nothing.

    A thread sends the rows: a slow or unreachable server neither stalls nor ends training. A
    tracker's first failure is an event; later rows are still tried, and closing counts lost rows.
    """

    def __init__(self, trackers: tuple[Tracker, ...] = (), emit: Emit | None = None) -> None:
        self._trackers = trackers
        self._emit = emit or partial(logging.getLogger(__name__).warning, "%s: %s")
        self._rows: queue.SimpleQueue[tuple[dict[str, float], int] | None] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._lost = {tracker.name: 0 for tracker in trackers}
        self._thread = threading.Thread(target=self._send_rows, name="trackers", daemon=True)
        if trackers:
            self._thread.start()

    def log(self, row: Mapping[str, object], step: int) -> None:
        """Queue the numbers of a row as <kind>/<key>; returns at once."""
        self._emit_events()
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
        """Send what is left, for a minute at most, and end the runs; idempotent."""
        if not self._trackers:
            return
        self._rows.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            message = f"Gave up sending after {CLOSE_TIMEOUT_S:.0f} s: {', '.join(self._lost)}."
            self._events.put(("tracker_lost_rows", message))
        for name, num_lost in self._lost.items():
            if num_lost:
                message = (
                    f"{name} lacks {plural(num_lost, 'row')} of this run; metrics.jsonl has them."
                )
                self._events.put(("tracker_lost_rows", message))
        self._emit_events()
        self._trackers = ()

    def _send_rows(self) -> None:
        while (item := self._rows.get()) is not None:
            for tracker in self._trackers:
                self._attempt(tracker, partial(tracker.log, *item))
        for tracker in self._trackers:
            self._attempt(tracker, tracker.close)

    def _attempt(self, tracker: Tracker, action: Callable[[], None]) -> None:
        try:
            action()
        except tracker.failures as error:
            if not self._lost[tracker.name]:
                message = f"{tracker.name} failed ({_one_line(error)}); training continues."
                self._events.put(("tracker_failed", message))
            self._lost[tracker.name] += 1

    def _emit_events(self) -> None:
        # In the caller's thread: the file that events go to has one writer.
        while not self._events.empty():
            self._emit(*self._events.get())


def open_trackers(job: JobConfig, resume_step: int = 0, emit: Emit | None = None) -> Trackers:
    """Open the trackers that the job reports to; on rank 0, before training. A run resumed at a
    step continues the tracker's run; `emit` takes events (the log by default). Raises JobError.
    """
    check(job.output.report_to)
    if not (wanted := names(job.output.report_to)):
        return Trackers()
    output_dir = Path(job.output.output_dir)
    run_name = job.output.run_name or output_dir.resolve().name
    storage = Storage.at(str(output_dir / FOLDER))
    storage.make()
    # There are none if no tracker was enabled before, or the run was killed while it opened one.
    run_ids = (storage.read_json(STATE_FILE) if resume_step else None) or {}
    trackers = []
    for name in wanted:
        start = Start(
            output_dir / FOLDER, run_name, redact(job.flat()), resume_step, run_ids.get(name)
        )
        trackers.append(_open(name, start))
        run_ids[name] = trackers[-1].run_id
    storage.write_json(STATE_FILE, run_ids)
    return Trackers(tuple(trackers), emit)


def _open(name: str, start: Start) -> Tracker:
    tracker = TRACKERS[name](_module(name))
    try:
        tracker.open(start)
    except tracker.failures as error:
        fix = f"{tracker.advice}, or take {name} out of report_to"
        raise JobError(f"{name} cannot be opened", _one_line(error), fix) from error
    return tracker


def _module(name: str) -> Any:
    return importlib.import_module(next(filter(_is_installed, TRACKERS[name].packages)))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
