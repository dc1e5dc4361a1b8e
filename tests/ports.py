"""A port that one process chooses and another one listens on a while later."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """Give a port of 127.0.0.1 that the system gives to nobody else while the block runs. Nothing
    listens on it; who allows the reuse of addresses, as servers do, can.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield int(held.getsockname()[1])
