"""End the workers when no optimizer step finishes within step_timeout, and name those that hang."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import ray
from ray.exceptions import RayError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from raytrain_adv.errors import Hung
from raytrain_adv.run.heartbeat import Heartbeat, Pulse

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.train.v2._internal.execution.worker_group import (
        Worker,
        WorkerGroup,
        WorkerGroupPollStatus,
    )

ASK_EVERY_S = 10.0  # most seconds between two requests to a worker
SHOWN = 8  # workers named in the message

# Ray Train calls a worker on its process's main thread; training runs on another one, of which a
# process has only one.
_heartbeats: list[Heartbeat] = []


def register(heartbeat: Heartbeat) -> None:
    """Make this worker's process answer from this heartbeat, instead of an earlier one."""
    _heartbeats[:] = [heartbeat]


def answer() -> Pulse | None:
    """Return the progress of this process's training thread; None before it starts."""
    return _heartbeats[0].pulse() if _heartbeats else None


class HangWatch(WorkerGroupCallback):  # type: ignore[misc] # ray is Any to mypy
    """Requests each worker's progress. Runs in Ray Train's controller, next to its own polling,
    which accepts 600 s of a worker's silence and does not know steps (ray 2.60).

    A worker that hangs gets an error in its Ray status, as if it had raised it: Ray then ends all
    workers, and restarts them if max_failures allows.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.ask_every_s = max(min(timeout_s / 4, ASK_EVERY_S), 0.5)
        self._workers: list[Worker] = []
        self._asked_at = 0.0
        self._open: dict[int, tuple[ObjectRef, float]] = {}  # rank -> unanswered request, sent when

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        """Watch these workers."""
        self._workers = list(worker_group.get_workers())
        self._open = {}

    def before_worker_group_shutdown(self, worker_group: WorkerGroup) -> None:
        """Stop watching."""
        self._workers, self._open = [], {}

    def after_worker_group_poll_status(self, worker_group_status: WorkerGroupPollStatus) -> None:
        """Request the workers' progress, and set an error on those that hang."""
        statuses = worker_group_status.worker_statuses
        if worker_group_status.errors or not all(s.running for s in statuses.values()):
            return
        now = time.monotonic()
        pulses = self._collect_answers()
        if now - self._asked_at >= self.ask_every_s:
            self._asked_at = now
            for rank, worker in enumerate(self._workers):
                if rank not in self._open:
                    self._open[rank] = (worker.execute_async(answer), now)
        silent_s = {rank: now - sent for rank, (_, sent) in self._open.items()}
        if hung := find_hung(pulses, silent_s, self.timeout_s):
            error = self._error(hung)
            for rank in hung:
                statuses[rank].error = error
                # Ray would first wait 30 s for it to leave its process group (ray 2.60).
                ray.kill(self._workers[rank].actor)

    def _collect_answers(self) -> dict[int, Pulse]:
        refs = {ref: rank for rank, (ref, _) in self._open.items()}
        done, _ = ray.wait([*refs], num_returns=len(refs), timeout=0) if refs else ([], [])
        pulses = {}
        for ref in done:
            del self._open[refs[ref]]
            # If the worker has died, Ray's own polling reports it, with the cause.
            with contextlib.suppress(RayError):
                pulses[refs[ref]] = ray.get(ref)
        return {rank: pulse for rank, pulse in pulses.items() if pulse is not None}

    def _error(self, hung: dict[int, str]) -> Hung:
        about = {rank: self._workers[rank].metadata for rank in hung}
        lines = [
            f"worker {rank} (node {about[rank].node_ip}, process {about[rank].pid}): {what}"
            for rank, what in hung.items()
        ]
        more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        return Hung(
            f"Training hangs: no optimizer step for step_timeout: {self.timeout_s:g} s, because of "
            f"worker {', '.join(map(str, hung))}",
            "\n".join([*lines[:SHOWN], *more]),
            "run again with resume_from_checkpoint: true, without its node if it is always the "
            "same one; max_failures: N restarts by itself; raise step_timeout if a step may take "
            "that long",
        )


def find_hung(
    pulses: dict[int, Pulse], silent_s: dict[int, float], timeout_s: float
) -> dict[int, str]:
    """Return rank -> what it does, of the workers that block the run; empty if it progresses.
    `pulses` have just arrived; `silent_s` are seconds since each rank's unanswered request.
    """
    stalled = {rank: p for rank, p in sorted(pulses.items()) if p.stalled_s > timeout_s}
    if not stalled and not any(s > timeout_s for s in silent_s.values()):
        return {}
    silent = {rank: s for rank, s in sorted(silent_s.items()) if s > timeout_s / 2}
    if silent:
        return {r: f"its process does not answer, for {s:.0f} s" for r, s in silent.items()}
    # Workers that wait for others are blocked themselves, unless all wait.
    causes = {rank: p for rank, p in stalled.items() if not p.waits} or stalled
    return {
        rank: f"{p.step} steps done since it was started, then {p.stalled_s:.0f} s at {p.place}"
        for rank, p in causes.items()
    }
