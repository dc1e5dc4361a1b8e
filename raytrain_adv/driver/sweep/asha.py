"""Which trials of a sweep are stopped early: asynchronous successive halving that waits for each
trial's own switch of a feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from ray.tune.schedulers import FIFOScheduler

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial


class Rungs:
    """The steps at which trials are compared, and what each had there.

    A trial is compared at the first evaluation at or after a rung's step, with those that were
    there before it, and goes on if it is among the best one in `factor` of them: the rule of ASHA
    (Li et al., 2018, arXiv:1810.05934), as Ray Tune's ASHAScheduler has it. That one counts every
    trial's steps from 0, so that a trial which switches it on late would be judged by what it
    was before; here a trial meets only rungs from its own switch plus the grace period on.

    Values are losses: the lowest is the best.

    Args:
        grace_steps: step of the first rung; each next one is `factor` times as far.
        factor: one trial in this many goes on.
        total_steps: steps of the longest trial; a rung at its end would save nothing.
        switches: trial -> step of its switch; none means that it has none to wait for.
        exempt: trials that are neither judged nor compared with: they are for reference.
    """

    def __init__(
        self,
        grace_steps: int,
        factor: int,
        total_steps: int,
        switches: Mapping[str, int],
        exempt: frozenset[str] = frozenset(),
    ) -> None:
        self.grace_steps = grace_steps
        self.factor = factor
        self.switches = switches
        self.exempt = exempt
        self.values: dict[int, dict[str, float]] = {}
        step = grace_steps
        while step < total_steps:
            self.values[step] = {}
            step *= factor
        self._reached: dict[str, int] = {}
        """Trial -> the last rung it was compared at."""
        self._let_go: set[str] = set()
        """Trials that were told to stop; they may make some more steps before they do."""

    def first_judged(self, name: str) -> int:
        """Return the step before which this trial is not judged."""
        return self.switches.get(name, 0) + self.grace_steps

    def judge(self, name: str, step: int, value: float | None) -> str | None:
        """Take in a trial's value at a step; return why it is to stop, or None for going on.

        Args:
            name: the trial.
            step: optimizer steps it has made.
            value: its loss; none or a value that is not finite counts as the worst.
        """
        if name in self.exempt or name in self._let_go:
            return None
        least = max(self.first_judged(name), self._reached.get(name, 0) + 1)
        due = [rung for rung in self.values if least <= rung <= step]
        if not due:
            return None
        rung = max(due)
        self._reached[name] = rung
        loss = math.inf if value is None or not math.isfinite(value) else value
        others = list(self.values[rung].values())
        self.values[rung][name] = loss
        if not others:
            return None
        # Between two losses that are infinite an interpolated one would be NaN.
        cutoff = float(np.percentile(others, 100 / self.factor, method="lower"))
        if loss <= cutoff:
            return None
        self._let_go.add(name)
        return (
            f"loss {'none' if value is None else f'{value:.4f}'} at step {rung}, where the best of "
            f"{len(others)} before it had {min(others):.4f}"
        )


class DelayAwareAsha(FIFOScheduler):  # type: ignore[misc] # ray is Any to mypy
    """Tune's view of the rungs. A trial is not torn down by Tune, but told to stop: it then ends
    its workers itself and leaves a report.
    """

    def __init__(self, rungs: Rungs, stop: Callable[[str, int, str], None]) -> None:
        super().__init__()
        self._rungs = rungs
        self._stop = stop

    def on_trial_result(
        self, tune_controller: TuneController, trial: Trial, result: Mapping[str, Any]
    ) -> str:
        """Judge the trial at its evaluations."""
        if "value" in result:
            name, step = trial.config["trial"], result["step"]
            reason = self._rungs.judge(name, step, result["value"])
            if reason is not None:
                self._stop(name, step, reason)
        return str(self.CONTINUE)
