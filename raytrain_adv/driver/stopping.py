"""How a sweep stops one of its trials: it leaves word in the trial's folder, and the trial's
controller ends the workers at their next report.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.train import UserCallback

from raytrain_adv.errors import TrainingError
from raytrain_adv.report.record import write_text

if TYPE_CHECKING:
    from ray.train.v2._internal.execution.context import TrainRunContext

STOP_FILE = "stop.json"


class StoppedBySweep(TrainingError):
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
