"""Notice that a worker will be taken away: Ray's, that its node is drained, or a SIGTERM."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context

# A signal is handled on the process's main thread, training is on another: here the two meet.
_terminated = threading.Event()


class ListenForSigterm(WorkerCallback):  # type: ignore[misc] # ray is Any to mypy
    """Has the first SIGTERM to a worker's process end the run between two steps, with a checkpoint;
    the second ends it as Ray does. Runs on the worker's main thread, as Ray Train makes it ready.
    """

    def after_init_train_context(self) -> None:
        """Take the signal."""
        before = signal.getsignal(signal.SIGTERM)

        def hear(number: int, frame: FrameType | None) -> None:
            _terminated.set()
            signal.signal(signal.SIGTERM, before)

        signal.signal(signal.SIGTERM, hear)


def termination_requested() -> bool:
    """Whether this worker's process has had a SIGTERM."""
    return _terminated.is_set()


class DrainNotice:
    """Looks, on a worker, whether Ray is about to lose a node of the run.

    Ray's get_preemption_info is a barrier for all workers; what it reads is looked at here without
    one (ray 2.60: train_fn_utils.py).
    """

    def __init__(self) -> None:
        self._known: set[str] = set()

    def new(self) -> str:
        """Say which nodes are about to go, once for each; empty if there is none."""
        info = get_train_context().preemption_context.preemption_info
        if info is None or set(info.preempted_node_ids) <= self._known:
            return ""
        self._known |= set(info.preempted_node_ids)
        ranks = ", ".join(str(rank) for rank in info.preempted_ranks)
        when = ""
        if info.deadline_ms is not None:
            when = f" in {max(info.deadline_ms / 1000 - time.time(), 0.0):.0f} s"
        return f"the node of worker {ranks} will be taken away{when}"
