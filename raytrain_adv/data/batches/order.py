"""The sequences of each step: a pure function of seed and step, not of the number of workers."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from raytrain_adv.errors import JobError


def random_order(n: int, *entropy: int) -> NDArray[np.int64]:
    """Return a permutation of range(n) that depends on `entropy` alone.

    It sorts raw 64-bit draws instead of calling Generator.permutation: NumPy promises stable
    streams for SeedSequence and the raw output of PCG64 only (NEP 19), and a run must be resumable
    after an upgrade.
    """
    raw = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(n)
    return np.argsort(np.asarray(raw), kind="stable")


def num_held_out(n: int, val_size: float, rows: str) -> int:
    """Return how many of `n` rows the job's val_size holds out; `rows` names them in errors. Raises
    JobError when none would be, or none left to train on.
    """
    num_held = int(val_size) if val_size >= 1 else round(n * val_size)
    if val_size and not 0 < num_held < n:
        raise JobError(
            "val_size leaves no rows to train on or none to evaluate",
            f"val_size: {val_size:g} of {n} {rows}",
            "choose a val_size between 1 row and all but one",
        )
    return num_held


@lru_cache(maxsize=4)
def epoch_permutation(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of `n` sequences in pass `epoch` (from 0): int64 [n], read-only."""
    order = random_order(n, seed, epoch)
    order.setflags(write=False)
    return order


def global_batch(step: int, batch: int, n: int, seed: int, shuffle: bool) -> NDArray[np.int64]:
    """Return the sequences of optimizer step `step` (from 0), all workers together: int64 [batch].

    Entry k is element step * batch + k of the endless stream epoch 0, epoch 1, ...; a step may span
    epochs.
    """
    position = np.arange(step * batch, (step + 1) * batch, dtype=np.int64)
    epochs, places = np.divmod(position, n)
    if not shuffle:
        return places
    parts = [epoch_permutation(n, seed, int(e))[places[epochs == e]] for e in np.unique(epochs)]
    return np.concatenate(parts)
