"""Read several datasets in turn: LLaMA-Factory's mix_strategy: interleave_*."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def interleave(
    datasets: Sequence[Callable[[], Iterator[T]]],
    strategy: str,
    shares: Sequence[float] | None,
    seed: int,
) -> Iterator[tuple[int, T]]:
    """Yield the dataset's number and the next row of one drawn by `shares`, or of each in turn.

    interleave_under ends when one dataset has no more rows, interleave_over when each has been read
    once (shorter ones begin again), interleave_once when all rows were read, none of them twice.
    """
    random = np.random.default_rng(seed)
    rows = [dataset() for dataset in datasets]
    left, turn = set(range(len(rows))), 0
    while left:
        known = sorted(left) if strategy == "interleave_once" else list(range(len(rows)))
        if shares is None:
            chosen, turn = known[turn % len(known)], turn + 1
        else:
            weights = np.array([shares[i] for i in known])
            chosen = int(random.choice(known, p=weights / weights.sum()))
        row = next(rows[chosen], None)
        if row is not None:
            yield chosen, row
            continue
        left.discard(chosen)
        if strategy == "interleave_under":
            return
        if strategy == "interleave_over" and left:
            rows[chosen] = datasets[chosen]()
            yield chosen, next(rows[chosen])
