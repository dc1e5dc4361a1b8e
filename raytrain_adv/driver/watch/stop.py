"""How a run is stopped from outside. A sweep leaves word in a trial's folder, and the trial's
controller ends the workers at their next report. A signal to the driver (Ctrl-C; SIGTERM, as
`ray job stop` sends it) has it leave word for the workers, which end after their step, with a
checkpoint.
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

from raytrain_adv.errors import Stopped
from raytrain_adv.report.record import write_text

if TYPE_CHECKING:
    from ray.train.v2._internal.execution.context import TrainRunContext

STOP_FILE = "stop.json"
ASK_FILE = "stop_after_step"
LOOK_EVERY_S = 0.5


class StoppedBySweep(Stopped):
    """The sweep's scheduler has let this trial go; nothing failed."""


class StopWhenTold(UserCallback):  # type: ignore[misc] # ray is Any to mypy
    """Ends the run, workers and all, once word to stop lies in its folder. Runs in Ray Train's
    controller, which is on the driver's node.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder.absolute() / STOP_FILE

    def after_report(self, run_context: TrainRunContext, metrics: Any, checkpoint: Any) -> None:
        """Raise in the controller where the run is to end."""
        if self._file.exists():
            raise StoppedBySweep(*json.loads(self._file.read_text()))


def tell(folder: Path, what: str, found: str, fix: str) -> None:
    """Leave word in a run's folder that it is to stop."""
    write_text(json.dumps([what, found, fix]), folder / STOP_FILE)


def take_back(folder: Path) -> None:
    """Remove the word, so that the run may begin anew."""
    (folder / STOP_FILE).unlink(missing_ok=True)


class AskedToStop:
    """Looks, on a worker, for the word that `asking` leaves; at most every LOOK_EVERY_S."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._looked_at = 0.0
        self._asked = False

    def now(self) -> bool:
        """Whether the run is to stop."""
        if not self._asked and time.monotonic() - self._looked_at >= LOOK_EVERY_S:
            self._looked_at = time.monotonic()
            # The folder is listed, as network file systems remember for long that a file was not
            # there. Storage that is away for a moment says nothing.
            with contextlib.suppress(OSError):
                self._asked = ASK_FILE in os.listdir(self._folder)
        return self._asked


def is_asked(folder: Path) -> bool:
    """Whether the driver was told to stop, and has left word."""
    return (folder / ASK_FILE).exists()


@contextlib.contextmanager
def asking(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """While the workers train, have SIGINT and SIGTERM ask them to stop; the second one ends the
    driver at once. Signals are left alone off the main thread, where a sweep's trials run.
    """
    (folder / ASK_FILE).unlink(missing_ok=True)
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if (folder / ASK_FILE).exists():
            raise SystemExit(128 + number)
        (folder / ASK_FILE).touch()
        say("told to stop: the run ends after this step, with a checkpoint; again ends it at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        (folder / ASK_FILE).unlink(missing_ok=True)
