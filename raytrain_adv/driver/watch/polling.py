"""A callable that is polled on a thread while Ray's calls block the driver."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

JOIN_S = 3.0


@contextlib.contextmanager
def poll(name: str, check: Callable[[], None], every_s: float) -> Iterator[None]:
    """Call `check` every `every_s` seconds on a thread called `name` while the block runs.

    `check` must not raise.
    """
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(every_s):
            check()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=JOIN_S)
