"""Translate Ray's errors for the user: the cause before its consequences, no useless retry."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import ControllerError, TrainingFailedError, UserCallback, WorkerGroupError

from raytrain_adv.errors import RaytrainAdvError, StorageError, TrainingError
from raytrain_adv.redaction import hide_environment
from raytrain_adv.storage.storage import Storage
from raytrain_adv.text import first_line

if TYPE_CHECKING:
    from ray.train.v2._internal.execution.context import TrainRunContext

# Errors of a healthy worker after another one has gone: never the cause if another error is known.
COLLATERAL = (
    "Connection closed by peer",
    "Connection reset by peer",
    "connectFullMesh failed",
    "NCCL communicator was aborted",
    "remote process exited",
    "Broken pipe",
    "Timed out waiting",
    "DistBackendError",
)
DIED = (RayActorError, OutOfMemoryError)
"""A process has gone. Ray's memory monitor kills those of a node that runs low, and its error is no
RayActorError (ray 2.60)."""
LOW_MEMORY = "its node ran low on memory, and Ray killed it"
LARGEST = 3
LAST_LINES = 12
REASON_FILE = "failure.json"


class StopWhenRetryCannotHelp(UserCallback):  # type: ignore[misc] # ray is Any to mypy
    """Ends the run at once on an error that would repeat; Ray would retry it max_failures times."""

    def after_exception(
        self, run_context: TrainRunContext, worker_exceptions: Mapping[int, Exception]
    ) -> None:
        """Raise a worker's own error in the controller, which ends the run."""
        for error in worker_exceptions.values():
            root = _unwrap(error)
            if isinstance(root, RaytrainAdvError) and not root.retry_can_help:
                raise root


class RecordRestartReason(UserCallback):  # type: ignore[misc] # ray is Any to mypy
    """Records for the next workers why they are started again; Ray does not pass it on."""

    def __init__(self, storage_path: str, attempt: str) -> None:
        self._storage_path = storage_path
        self._attempt = attempt

    def after_exception(
        self, run_context: TrainRunContext, worker_exceptions: Mapping[int, Exception]
    ) -> None:
        """Write down how the workers failed."""
        with contextlib.suppress(OSError, StorageError):  # the run continues without it
            folder = Storage.at(self._storage_path).folder(self._attempt)
            write_restart_reason(folder, _in_a_sentence(worker_exceptions))


def write_restart_reason(attempt: Storage, message: str) -> None:
    """Write into an attempt's folder why its next workers are started."""
    attempt.make()
    message = hide_environment(message)
    attempt.write_json(REASON_FILE, {"message": f"{message}; the workers were started again"})


def take_restart_reason(attempt: Storage) -> str:
    """Return why these workers were started again, and clear it; empty if there is no reason."""
    reason = attempt.read_json(REASON_FILE)
    if reason is None:
        return ""
    attempt.write_json(REASON_FILE, {"message": ""})
    return str(reason["message"])


def _unwrap(error: BaseException) -> BaseException:
    """Return the error that the worker's code raised, without Ray's wrappers."""
    # ray.train's UserExceptionWithTraceback has no public accessor; the other attribute is of a
    # worker that has died and does not answer.
    inner = getattr(error, "_base_exc", None) or getattr(error, "health_check_failure", None)
    return _unwrap(inner) if isinstance(inner, BaseException) else error


def translate(
    error: TrainingFailedError | RayActorError | OutOfMemoryError,
) -> RaytrainAdvError:
    """Return the error to show: a worker's own, else the last lines of the first that failed."""
    if isinstance(error, WorkerGroupError):
        return _of_workers(error.worker_failures)
    fix = "run the job again with resume_from_checkpoint: true"
    if not isinstance(error, ControllerError):
        why = f": {LOW_MEMORY}" if isinstance(error, OutOfMemoryError) else ""
        return TrainingError(f"Ray Train's controller died{why}", _last_lines(error), fix)
    root, fix = _unwrap(error.controller_failure), "see the Ray dashboard's logs"
    if isinstance(root, RaytrainAdvError):
        return root
    return TrainingError("Ray Train's controller failed", _last_lines(root), fix)


def _of_workers(failures: Mapping[int, Exception]) -> RaytrainAdvError:
    rank, cause = _first_cause(failures)
    root = _unwrap(cause)
    if isinstance(root, RaytrainAdvError):
        root.rank = rank
        return root
    others = [r for r in failures if r != rank]
    found = _last_lines(cause) + (f"\nworkers {others} failed with it" if others else "")
    fix = "run again with resume_from_checkpoint: true; max_failures: N restarts by itself"
    shown = TrainingError(_what(rank, root), found, fix)
    shown.rank = rank
    return shown


def _in_a_sentence(failures: Mapping[int, Exception]) -> str:
    rank, cause = _first_cause(failures)
    root = _unwrap(cause)
    if isinstance(root, RaytrainAdvError):
        return f"{root.what}: {root.found.splitlines()[0]}" if root.found else root.what
    if isinstance(root, DIED):
        return _what(rank, root)
    return f"{_what(rank, root)}: {_last_lines(cause).splitlines()[-1]}"


def _first_cause(failures: Mapping[int, Exception]) -> tuple[int, Exception]:
    """Return the rank and the most informative failure: our own first, collateral ones last."""

    def order(item: tuple[int, Exception]) -> tuple[bool, bool, int]:
        rank, error = item
        root = _unwrap(error)
        is_collateral = any(sign in str(error) for sign in COLLATERAL)
        died = isinstance(root, DIED)
        return not isinstance(root, RaytrainAdvError), is_collateral and not died, rank

    return min(failures.items(), key=order)


def _what(rank: int, root: BaseException) -> str:
    why = f": {LOW_MEMORY}" if isinstance(root, OutOfMemoryError) else ""
    return f"Worker {rank} {'died' if isinstance(root, DIED) else 'failed'}{why}"


def memory_found(error: OutOfMemoryError) -> str:
    """Return how full the node was, and its largest processes."""
    heading = "Top 10 memory users: PID\tMEM(GB)\tCOMMAND"
    largest = str(error).partition(heading)[2].strip().splitlines()[:LARGEST]
    return "\n".join([first_line(error), *(f"{line[:80]} (pid, GB, command)" for line in largest)])


def _last_lines(error: BaseException) -> str:
    root = _unwrap(error)
    if isinstance(root, OutOfMemoryError):
        return memory_found(root)
    notes = getattr(root, "__notes__", [])  # the innermost frames, added by ray_worker
    text = "\n".join([*notes, f"{type(root).__name__}: {root}"]) if notes else str(error)
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return "\n".join(lines[-LAST_LINES:]) or type(error).__name__
