"""Imports that take a fifth less time: Python looks for garbage meanwhile, and they leave none."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

RARELY = (20_000, 50, 10)
USUALLY = gc.get_threshold()


@contextmanager
def few_collections() -> Iterator[None]:
    """Look for garbage less often within the block."""
    gc.set_threshold(*RARELY)
    try:
        yield
    finally:
        gc.set_threshold(*USUALLY)


def end_imports() -> None:
    """Look for garbage as often as Python does by itself, and not in what has been imported."""
    gc.set_threshold(*USUALLY)
    gc.freeze()
