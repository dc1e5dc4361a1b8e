"""Ends a run with a word where Ray's head node is gone. Ray itself ends the driver's process after
60 s, with exit code 1 and no report (ray 2.60, rpc_client.h), and its calls take no signals then.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import ray

from raytrain_adv.driver.watch.polling import looking
from raytrain_adv.errors import HeadLost
from raytrain_adv.redaction import hide_environment

EVERY_S = 2.0
ENDED_AFTER_S = 45.0
"""Seconds without an answer after which the run ends; a head that is back before it goes on, where
its state is kept outside it (Ray's fault tolerance of the GCS)."""
TIMEOUT_S = 3.0


class HeadWatch:
    """Tries, on a thread of the driver, whether the head can be reached; ends the process where it
    cannot.

    Args:
        address: host:port of the head's GCS.
        leave: writes down how the run ended, before the process does; it must not call Ray.
    """

    def __init__(self, address: str, leave: Callable[[HeadLost], None]) -> None:
        self._address = address
        self._leave = leave
        self._watched = False
        self._heard = 0.0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch for as long as the block runs. Not in a sweep's trials, which run off the main
        thread: the sweep's own driver watches. Nor a head that cannot be reached from here now: one
        behind a ray:// address need not be.
        """
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or not self._answers():
            yield
            return
        self._watched, self._heard = True, time.monotonic()
        with looking("head watch", self._look, EVERY_S):
            yield

    def wait(self) -> None:
        """Return once the head can be reached; until then the watch may end the process."""
        while self._watched and not self._answers():
            time.sleep(EVERY_S)

    def _look(self) -> None:
        if self._answers():
            self._heard = time.monotonic()
        elif time.monotonic() - self._heard >= ENDED_AFTER_S:
            self._end()

    def _answers(self) -> bool:
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=TIMEOUT_S).close()
        except OSError:
            return False
        return True

    def _end(self) -> None:
        error = HeadLost(
            "Ray's head node is gone",
            f"no answer at {self._address} for {ENDED_AFTER_S:g} s; Ray ends every worker then",
            "start the cluster again, and run the job again with resume_from_checkpoint: true",
        )
        try:
            self._leave(error)
        finally:
            print(f"\n{hide_environment(str(error))}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.exit_code)


def address() -> str:
    """Return host:port of the GCS that this process has joined."""
    return str(ray.get_runtime_context().gcs_address)
