"""The console of a sweep: a line for each start, evaluation and end of a trial."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from ray import tune

from raytrain_adv import text as numbers
from raytrain_adv.driver.sweep.results import Results
from raytrain_adv.driver.training.console import printable


class Progress(tune.Callback):  # type: ignore[misc] # ray is Any to mypy
    """Prints Tune's events, and keeps sweep.json and sweep.html up to date."""

    def __init__(self, results: Results, num_trials: int) -> None:
        self._results = results
        self._num_trials = num_trials
        self._num_started = 0
        self._began = time.monotonic()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print that a trial starts."""
        self._num_started += 1
        self._results.started(_name(trial))
        self._print(trial, f"started ({self._num_started} of {self._num_trials})")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        """Print a trial's step and loss."""
        if "value" in result:
            total = result.get("total_steps")
            of_total = f" of {total:,}" if total else ""
            value = numbers.loss(result["value"])
            self._print(trial, f"step {result['step']:,}{of_total}, loss {value}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print how a trial ended."""
        self._print_end(trial, None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print that a trial's process died, or that its code failed."""
        self._print_end(trial, trial.get_error())

    def _print_end(self, trial: Any, error: BaseException | None) -> None:
        one = self._results.ended(_name(trial), error)
        if one.status == "done":
            self._print(trial, f"done, {self._results.describe(one.metric)}")
        else:
            first = (one.error or "").partition("\n")[0]
            self._print(trial, f"{one.status} after {numbers.plural(one.steps, 'step')}: {first}")

    def _print(self, trial: Any, text: str) -> None:
        line = f"[{numbers.clock(time.monotonic() - self._began)}] {_name(trial)}: {text}"
        print(printable(line, sys.stdout.encoding), flush=True)


def _name(trial: Any) -> str:
    return str(trial.config["trial"])
