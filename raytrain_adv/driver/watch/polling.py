"""What the driver looks at again and again while Ray's own calls hold it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

JOIN_S = 3.0


@contextlib.contextmanager
def looking(name: str, look: Callable[[], None], every_s: float) -> Iterator[None]:
    """Call `look` every `every_s` seconds, on a thread, for as long as the block runs.

    Args:
        name: of the thread.
        look: must not raise.
        every_s: seconds between two calls.
    """
    over = threading.Event()

    def follow() -> None:
        while not over.wait(every_s):
            look()

    thread = threading.Thread(target=follow, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=JOIN_S)
