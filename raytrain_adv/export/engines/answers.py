"""What the scripts share: the tokens they are asked for, and the lines that `verify` reads."""

import json
import time
from collections.abc import Callable, Iterable
from importlib.metadata import packages_distributions, version
from typing import Any

import numpy as np

NUM_DECODED = 32
"""Tokens that are generated to measure the speed, one after the other, of one sequence."""


def asked(folder: str) -> tuple[list[int], int]:
    """Return a folder's compared tokens, and how many log-probabilities of each are known."""
    known = np.load(f"{folder}/trained_logprobs.npz")
    return known["tokens"].tolist(), int(known["ids"].shape[1])


def top(logits: Any, num: int) -> list[dict[int, float]]:
    """Return the `num` largest log-probabilities of each row of logits, a tensor, by token id."""
    values, ids = logits.float().log_softmax(-1).topk(num)
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return [dict(zip(*pair, strict=True)) for pair in pairs]


def answer(found: Iterable[dict[int, float]], module: str, decode: Callable[[], object]) -> None:
    """Print what was found for each position but the first, and how fast `decode` makes NUM_DECODED
    tokens: the better of two times, on the clock and in processor seconds of all threads. `module`
    is the engine's, whose version is printed.
    """
    print("FOUND " + json.dumps(list(found)))
    times = []
    for _ in range(2):
        began = time.perf_counter(), time.process_time()
        decode()
        times.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    clock, processor = (NUM_DECODED / min(column) for column in zip(*times, strict=True))
    speed = {"tokens_per_s": clock, "tokens_per_cpu_s": processor}
    package = packages_distributions()[module][0]
    print("SPEED " + json.dumps({**speed, "engine": f"{package} {version(package)}"}))
