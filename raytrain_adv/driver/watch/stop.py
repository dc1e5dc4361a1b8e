"""Stop a run from outside, or end it before its node goes.

A sweep writes stop.json into a trial's folder; on Ctrl-C or SIGTERM (as `ray job stop` sends it)
the driver writes stop_after_step. A worker's process may get its own SIGTERM, and Ray announces
nodes that it drains.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ray.train import UserCallback
from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context

from raytrain_adv.errors import Stopped
from raytrain_adv.storage import metrics_file
from raytrain_adv.storage.atomic import write_atomic

if TYPE_CHECKING:
    from ray.train.v2._internal.execution.context import TrainRunContext

SWEEP_STOP_FILE = "stop.json"
STOP_FILE = "stop_after_step"
CHECK_EVERY_S = 0.5

# Signals are handled on the process's main thread, and training runs on another one.
_terminated = threading.Event()


class StoppedBySweep(Stopped):
    """The sweep's scheduler stopped this trial; nothing failed."""


class StopOnRequest(UserCallback):  # type: ignore[misc] # ray is Any to mypy
    """Ends the run with all workers, from Ray Train's controller, if its folder has stop.json; one
    that has done its last step has nothing left to save, and becomes a model.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()

    def after_report(self, run_context: TrainRunContext, metrics: Any, checkpoint: Any) -> None:
        """Raise in the controller if the sweep has stopped this trial."""
        file = self._folder / SWEEP_STOP_FILE
        if file.exists() and not _has_trained(self._folder):
            raise StoppedBySweep(*json.loads(file.read_text()))


def _has_trained(folder: Path) -> bool:
    total, step = None, 0
    for row in metrics_file.read(folder / metrics_file.FILE_NAME):
        if row["kind"] == "train":
            step = row["step"]
        elif row.get("event") == "plan":
            total, step = row.get("total_steps", total), row.get("resumed_from_step") or 0
        elif row.get("event") == "early_stop":
            total = row["step"]
    return step == total


def request_trial_stop(folder: Path, what: str, found: str, fix: str) -> None:
    """Stop the trial in this folder at its next report, with this error."""
    write_atomic(folder / SWEEP_STOP_FILE, json.dumps([what, found, fix]))


def clear_trial_stop(folder: Path) -> None:
    """Remove an earlier stop request, so that the trial can run again."""
    (folder / SWEEP_STOP_FILE).unlink(missing_ok=True)


class StopRequest:
    """Checks on a worker for the file of `handle_signals`, at most every CHECK_EVERY_S."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._checked_at = 0.0
        self._is_set = False

    def is_set(self) -> bool:
        """Whether the run has to stop."""
        if not self._is_set and time.monotonic() - self._checked_at >= CHECK_EVERY_S:
            self._checked_at = time.monotonic()
            # The folder is listed, because network file systems cache for long that a file does not
            # exist. Storage that is briefly unavailable means no request.
            with contextlib.suppress(OSError):
                self._is_set = STOP_FILE in os.listdir(self._folder)
        return self._is_set


@contextlib.contextmanager
def handle_signals(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """While the workers train, request a stop on the first SIGINT or SIGTERM, and end the driver on
    the second. Outside the main thread, where a sweep's trials run, signals are not handled.
    """
    file = folder / STOP_FILE
    file.unlink(missing_ok=True)
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def request(number: int, frame: FrameType | None) -> None:
        if file.exists():
            raise SystemExit(128 + number)
        file.touch()
        say(
            "stop requested: the run ends after this step with a checkpoint; a second signal ends "
            "it at once"
        )

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        file.unlink(missing_ok=True)


class CatchSigterm(WorkerCallback):  # type: ignore[misc] # ray is Any to mypy
    """Makes the first SIGTERM to a worker's process end the run between two steps with a
    checkpoint; the second has Ray's effect. Runs on the worker's main thread.
    """

    def after_init_train_context(self) -> None:
        """Install the signal handler."""
        before = signal.getsignal(signal.SIGTERM)

        def terminate(number: int, frame: FrameType | None) -> None:
            _terminated.set()
            signal.signal(signal.SIGTERM, before)

        signal.signal(signal.SIGTERM, terminate)


def is_terminated() -> bool:
    """Whether this worker's process has received a SIGTERM."""
    return _terminated.is_set()


class DrainNotice:
    """Checks on a worker whether Ray is about to remove a node of the run. Ray's
    get_preemption_info has the same behind a barrier (ray 2.60).
    """

    def __init__(self) -> None:
        self._known: set[str] = set()

    def new(self) -> str:
        """Return a sentence on nodes about to be removed, once for each; empty if there is none."""
        info = get_train_context().preemption_context.preemption_info
        if info is None or set(info.preempted_node_ids) <= self._known:
            return ""
        self._known |= set(info.preempted_node_ids)
        ranks, when = ", ".join(map(str, info.preempted_ranks)), ""
        if info.deadline_ms is not None:
            when = f" in {max(info.deadline_ms / 1000 - time.time(), 0.0):.0f} s"
        return f"the node of worker {ranks} will be taken away{when}"
