"""What a sweep says while it runs: a line for each start, evaluation and end of a trial."""

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
    """Follows the trials for Tune, prints, and keeps sweep.json and sweep.html up to date."""

    def __init__(self, results: Results, num_trials: int) -> None:
        self._results = results
        self._num_trials = num_trials
        self._num_started = 0
        self._began = time.monotonic()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say that a trial begins."""
        self._num_started += 1
        self._results.started(_name(trial))
        self._say(trial, f"started ({self._num_started} of {self._num_trials})")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        """Say what a trial has reached."""
        if "value" in result:
            total = result.get("total_steps")
            of_total = f" of {total:,}" if total else ""
            value = numbers.loss(result["value"])
            self._say(trial, f"step {result['step']:,}{of_total}, loss {value}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say how a trial ended."""
        self._ended(trial, None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say that a trial's own process died, or that its code failed."""
        self._ended(trial, trial.get_error())

    def _ended(self, trial: Any, error: BaseException | None) -> None:
        one = self._results.ended(_name(trial), error)
        if one.status == "done":
            self._say(trial, f"done, {self._results.described(one.metric)}")
        else:
            first = (one.error or "").partition("\n")[0]
            self._say(trial, f"{one.status} after {numbers.plural(one.steps, 'step')}: {first}")

    def _say(self, trial: Any, text: str) -> None:
        line = f"[{numbers.clock(time.monotonic() - self._began)}] {_name(trial)}: {text}"
        print(printable(line, sys.stdout.encoding), flush=True)


def _name(trial: Any) -> str:
    return str(trial.config["trial"])
