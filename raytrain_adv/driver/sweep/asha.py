"""Stop trials of a sweep early, by successive halving that waits for each trial's own switch."""

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
    """The steps at which trials are compared, and each trial's loss there; the lowest is best.

    The first rung is at `grace_steps`, each next one `factor` times as far, below `total_steps`. A
    trial is compared at its first evaluation at or after a rung's step with the trials that reached
    the rung before it. It continues if it is among the best 1/`factor` of them: the rule of ASHA
    (Li et al., 2018, arXiv:1810.05934), as in Ray Tune's ASHAScheduler. Ray's counts every trial's
    steps from 0, and would judge a trial by its loss before its switch (`switches`); here a trial
    skips all rungs before that plus the grace period. `exempt` are neither judged nor compared
    with. Of the trials in `keep_best`, which export the model of their lowest loss, that loss
    counts.
    """

    def __init__(
        self,
        grace_steps: int,
        factor: int,
        total_steps: int,
        switches: Mapping[str, int],
        exempt: frozenset[str] = frozenset(),
        keep_best: frozenset[str] = frozenset(),
    ) -> None:
        self.grace_steps = grace_steps
        self.factor = factor
        self.switches = switches
        self.exempt = exempt
        self._lowest: dict[str, float] = dict.fromkeys(keep_best, math.inf)
        self.values: dict[int, dict[str, float]] = {}
        while grace_steps < total_steps:
            self.values[grace_steps] = {}
            grace_steps *= factor
        self._reached: dict[str, int] = {}  # trial -> the last rung it was compared at
        self._stopped: set[str] = set()  # trials that have to stop; they may still make a few steps

    def first_judged(self, name: str) -> int:
        """Return the step before which this trial is not judged."""
        return self.switches.get(name, 0) + self.grace_steps

    def judge(self, name: str, step: int, value: float | None) -> str | None:
        """Record a trial's loss at a step; return why it has to stop, or None if it continues. A
        loss of None, or a non-finite one, counts as the worst.
        """
        if name in self._lowest and step and value is not None and math.isfinite(value):
            value = self._lowest[name] = min(value, self._lowest[name])
        least = max(self.first_judged(name), self._reached.get(name, 0) + 1)
        rung = max((rung for rung in self.values if least <= rung <= step), default=None)
        if rung is None or name in self.exempt or name in self._stopped:
            return None
        self._reached[name] = rung
        loss = math.inf if value is None or not math.isfinite(value) else value
        others = list(self.values[rung].values())
        self.values[rung][name] = loss
        # Interpolated between two infinite losses, the cutoff would be NaN.
        percentile = 100 / self.factor
        if not others or loss <= np.percentile(others, percentile, method="lower"):
            return None
        self._stopped.add(name)
        return (
            f"loss {'none' if value is None else f'{value:.4f}'} at step {rung}, where the best of "
            f"{len(others)} before it had {min(others):.4f}"
        )


class DelayAwareAsha(FIFOScheduler):  # type: ignore[misc] # ray is Any to mypy
    """Tune's scheduler with rungs; a stopped trial ends its workers and still writes its report."""

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
            if reason := self._rungs.judge(name, step, result["value"]):
                self._stop(name, step, reason)
        return str(self.CONTINUE)
