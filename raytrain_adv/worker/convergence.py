"""Watches whether the loss rises with a feature on, and says what of its keys to try."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from raytrain_adv.transforms.transform import Transform

WINDOW = 3
"""Logged losses that are compared by their median: one bad batch is no rise."""
RISE = 1.1
"""How many times the loss from before a feature began is called a rise."""


class Convergence:
    """Compares the loss since a feature began with the loss before.

    Args:
        transforms: the features that are on in this run; one that begins with the first step is
            held against the first losses.
        say: tells the user a sentence.
    """

    def __init__(self, transforms: Sequence[Transform], say: Callable[[str], None]) -> None:
        self.watched = list(transforms)
        self.say = say
        self.losses: list[tuple[int, float]] = []

    def see(self, done: int, loss: float) -> None:
        """Take the loss that was logged after `done` steps; say where it has risen, once for each
        feature.
        """
        self.losses.append((done, loss))
        for transform in list(self.watched):
            remedy = transform.remedy(done - 1)
            if not remedy:
                continue
            off = [loss for at, loss in self.losses if not transform.is_on(at - 1)]
            on = [loss for at, loss in self.losses if transform.is_on(at - 1)]
            before = off[-WINDOW:] or on[:WINDOW]
            since = on[-WINDOW:] if off else on[WINDOW:][-WINDOW:]
            if len(since) == WINDOW and median(since) > RISE * median(before):
                self.watched.remove(transform)
                self.say(
                    f"the loss has risen from {median(before):.4f} to {median(since):.4f} with "
                    f"{type(transform).feature}: {remedy}, or lower learning_rate"
                )
