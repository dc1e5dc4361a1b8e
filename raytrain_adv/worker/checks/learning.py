"""Tell a run that learns nothing: zero gradients, a loss of guessing, or one that did not fall."""

import math
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

from raytrain_adv.worker.checks.loss_guard import has_risen

EVENT = "dead_run"
NEAR = 0.03  # share of ln(vocabulary) within which a loss is one of guessing
IN_A_ROW = 5  # logged losses of guessing, or zero norms, in a row that are reported
FEWEST = 12  # logged losses that a verdict on the whole run needs
FELL = 0.01  # share by which a held-out loss must have fallen to prove that the run learned


class LearningCheck:
    """Judges the logged losses; each kind of dead run is shown once, as an event and in the report.

    `vocabulary` is the number of tokens that the model chooses from, `smaller` the advice for
    updates that are too large.
    """

    def __init__(self, vocabulary: int, say: Callable[..., None], smaller: str) -> None:
        self.guessing = math.log(max(vocabulary, 2))
        self.say = say
        self.smaller = smaller
        self.losses: list[float] = []
        self.num_guesses = self.num_zeros = 0
        self.has_learned = False  # whether a logged loss was well below that of guessing
        self.told: set[str] = set()

    def add(self, done: int, row: Mapping[str, Any]) -> None:
        """Take the row logged after `done` steps."""
        loss = float(row["loss"])
        if not math.isfinite(loss):
            return
        self.losses.append(loss)
        self.num_zeros = self.num_zeros + 1 if row.get("grad_norm") == 0.0 else 0
        is_guess = loss >= (1 - NEAR) * self.guessing
        self.num_guesses = self.num_guesses + 1 if is_guess else 0
        if self.num_zeros == IN_A_ROW:
            self._tell(
                "zero",
                f"step {done}: all gradients are zero in {IN_A_ROW} logged steps in a row: the "
                "weights do not change. Check which weights are frozen, and what the loss is "
                "computed on (raytrain-adv data)",
            )
        if self.num_guesses == IN_A_ROW:
            before = " again" if self.has_learned else ""
            self._tell(
                "guessing",
                f"step {done}: the loss is {loss:.4f}{before}; ln(vocabulary) = "
                f"{self.guessing:.4f} is that of guessing among all tokens. The model has learned "
                f"nothing{' that is left' if before else ' yet'}: {self.smaller}",
            )
        self.has_learned = self.has_learned or not is_guess

    def finish(self, evaluations: Mapping[str, Mapping[str, float]]) -> None:
        """Judge the whole run; `evaluations` maps steps to what the held-out rows showed."""
        held_out = [evaluations[step]["loss"] for step in sorted(evaluations, key=int)]
        fell = len(held_out) > 1 and held_out[-1] < (1 - FELL) * held_out[0]
        if len(self.losses) < FEWEST or self.told or fell:
            return
        part = len(self.losses) // 4
        first, last = self.losses[:part], self.losses[-part:]
        words = (
            f"{fmean(first):.4f} over the first {part} logged steps, {fmean(last):.4f} over the "
        )
        words += f"last {part}"
        if has_risen(first, last) or fmean(last) > 2 * fmean(first):
            self._tell("risen", f"the training loss has risen: {words}; {self.smaller}")
        elif fmean(last) >= fmean(first):
            fix = "raise learning_rate, train longer, or check what the loss is computed on"
            self._tell("flat", f"the training loss has not fallen: {words}; {fix}")

    def _tell(self, kind: str, sentence: str) -> None:
        if kind not in self.told:
            self.told.add(kind)
            self.say(sentence, event=EVENT)
