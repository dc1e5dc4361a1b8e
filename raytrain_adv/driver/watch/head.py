"""End a run with a message when Ray's head node is lost. Ray itself ends the driver's process after
60 s, with exit code 1 and no report (ray 2.60, rpc_client.h), and its calls block signals until
then.
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

from raytrain_adv.driver.watch.polling import poll
from raytrain_adv.errors import HeadLost
from raytrain_adv.redaction import hide_environment

EVERY_S = 2.0
LOST_AFTER_S = 45.0
"""Seconds without an answer after which the run ends. If the head returns earlier and its state is
stored outside it (Ray's GCS fault tolerance), the run continues."""
TIMEOUT_S = 3.0


class HeadWatch:
    """Checks on a thread of the driver that the head can be reached, and ends the process if not.

    Args:
        address: host:port of the head's GCS.
        record: records how the run ended, before the process ends; it must not call Ray.
    """

    def __init__(self, address: str, record: Callable[[HeadLost], None]) -> None:
        self._address = address
        self._record = record
        self._is_watching = False
        self._last_answer = 0.0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the block runs.

        A sweep's trials do not watch: they run outside the main thread, and the sweep's own driver
        watches. Nor is a head watched that cannot be reached from here at the start, such as one
        behind a ray:// address.
        """
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or not self._answers():
            yield
            return
        self._is_watching, self._last_answer = True, time.monotonic()
        with poll("head watch", self._check, EVERY_S):
            yield

    def wait(self) -> None:
        """Return when the head can be reached; the watch may end the process before that."""
        while self._is_watching and not self._answers():
            time.sleep(EVERY_S)

    def _check(self) -> None:
        if self._answers():
            self._last_answer = time.monotonic()
        elif time.monotonic() - self._last_answer >= LOST_AFTER_S:
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
            f"no answer at {self._address} for {LOST_AFTER_S:g} s; Ray then ends every worker",
            "start the cluster again, and run the job again with resume_from_checkpoint: true",
        )
        try:
            self._record(error)
        finally:
            print(f"\n{hide_environment(str(error))}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.exit_code)


def address() -> str:
    """Return host:port of the GCS that this process has joined."""
    return str(ray.get_runtime_context().gcs_address)
