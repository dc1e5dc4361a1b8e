"""Watches whether the loss rises with a feature on, and says what of its keys to try."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from raytrain_adv.transforms.transform import Transform

WINDOW = 3
"""Logged losses that are compared by their median: one bad batch is no rise."""
RISE = 1.1
"""How many times the loss from before a feature began is called a rise."""


def _window() -> deque[float]:
    return deque(maxlen=WINDOW)


@dataclass(eq=False)
class Seen:
    """The losses that one feature is judged by: a few, however long the run."""

    off: deque[float] = field(default_factory=_window)
    """The last ones without it."""
    first: list[float] = field(default_factory=list)
    """The first ones with it."""
    later: deque[float] = field(default_factory=_window)
    """The last ones with it, after those."""

    def take(self, loss: float, is_on: bool) -> None:
        """Take the next loss."""
        if not is_on:
            self.off.append(loss)
        elif len(self.first) < WINDOW:
            self.first.append(loss)
        else:
            self.later.append(loss)

    def compared(self) -> tuple[list[float], list[float]]:
        """Return the losses from before it began, or its first, and the last ones since."""
        if not self.off:
            return self.first, list(self.later)
        return list(self.off), [*self.first, *self.later][-WINDOW:]


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
        self.seen = [Seen() for _ in self.watched]

    def see(self, done: int, loss: float) -> None:
        """Take the loss that was logged after `done` steps; say where it has risen, once for each
        feature.
        """
        for transform, seen in list(zip(self.watched, self.seen, strict=True)):
            seen.take(loss, transform.is_on(done - 1))
            remedy = transform.remedy(done - 1)
            if not remedy:
                continue
            before, since = seen.compared()
            if len(since) == WINDOW and median(since) > RISE * median(before):
                self.watched.remove(transform)
                self.seen.remove(seen)
                self.say(
                    f"the loss has risen from {median(before):.4f} to {median(since):.4f} with "
                    f"{type(transform).feature}: {remedy}, or lower learning_rate"
                )
