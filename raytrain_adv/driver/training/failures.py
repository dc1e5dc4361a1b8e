"""From what Ray raises to what the user reads: the cause before its collateral, and no retry that
cannot help.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ray.exceptions import RayActorError
from ray.train import ControllerError, TrainingFailedError, UserCallback, WorkerGroupError

from raytrain_adv.errors import RaytrainAdvError, Stopped, StorageError, TrainingError
from raytrain_adv.redaction import hide_environment
from raytrain_adv.storage.storage import Storage

if TYPE_CHECKING:
    from ray.train.v2._internal.execution.context import TrainRunContext

# What a healthy worker says when another one has gone: never the cause when anything else is known.
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
LAST_LINES = 12
WORD = "failure.json"


class StopWhenRetryCannotHelp(UserCallback):  # type: ignore[misc] # ray is Any to mypy
    """Ends the run at once on an error that running again would repeat; Ray would retry it
    max_failures times.
    """

    def after_exception(
        self, run_context: TrainRunContext, worker_exceptions: Mapping[int, Exception]
    ) -> None:
        """Raise a worker's own error in the controller, which ends the run."""
        for error in worker_exceptions.values():
            root = unwrapped(error)
            if isinstance(root, RaytrainAdvError) and not root.retry_can_help:
                raise root


class TellTheNextStart(UserCallback):  # type: ignore[misc] # ray is Any to mypy
    """Leaves word of why workers are started again, which Ray keeps to itself."""

    def __init__(self, storage_path: str, attempt: str) -> None:
        self._storage_path = storage_path
        self._attempt = attempt

    def after_exception(
        self, run_context: TrainRunContext, worker_exceptions: Mapping[int, Exception]
    ) -> None:
        """Write down what has happened to the workers."""
        with contextlib.suppress(OSError, StorageError):  # the run goes on without the word
            folder = Storage.at(self._storage_path).folder(self._attempt)
            leave_word(folder, _in_a_sentence(worker_exceptions))


def leave_word(attempt: Storage, message: str) -> None:
    """Leave word in an attempt's folder for the next start of its workers."""
    attempt.make()
    message = hide_environment(message)
    attempt.write_json(WORD, {"message": f"{message}; the workers were started again"})


def take_word(attempt: Storage) -> str:
    """Return what was left for this start, once; empty if nothing was."""
    word = attempt.read_json(WORD)
    if word is None:
        return ""
    attempt.write_json(WORD, {"message": ""})
    return str(word["message"])


def unwrapped(error: BaseException) -> BaseException:
    """Return the error the worker's code raised, out of Ray's wrappers."""
    # ray.train's UserExceptionWithTraceback has no public accessor; the other is of a worker that
    # did not answer, as it has died.
    inner = getattr(error, "_base_exc", None) or getattr(error, "health_check_failure", None)
    return unwrapped(inner) if isinstance(inner, BaseException) else error


def translated(error: TrainingFailedError | RayActorError) -> RaytrainAdvError:
    """Return the error to show: a worker's own house error as it is, else the most telling worker's
    last lines.
    """
    if isinstance(error, ControllerError):
        root = unwrapped(error.controller_failure)
        if isinstance(root, RaytrainAdvError):
            return root
        return TrainingError(
            "Ray Train's controller failed", _last_lines(root), "see the Ray dashboard's logs"
        )
    if isinstance(error, WorkerGroupError):
        return _of_workers(error.worker_failures)
    return TrainingError(
        "Ray Train's controller died",
        _last_lines(error),
        "run the job again with resume_from_checkpoint: true",
    )


def stopped(error: SystemExit) -> Stopped:
    """Return the error to show when the driver was told to end: Ray Train makes an exit of both
    signals.
    """
    return Stopped(
        "The run was stopped",
        f"by Ctrl-C, or by SIGTERM as ray job stop sends it (exit code {error.code})",
        "run again with resume_from_checkpoint: true to go on from the last checkpoint",
    )


def _of_workers(failures: Mapping[int, Exception]) -> RaytrainAdvError:
    rank, cause = _first_cause(failures)
    root = unwrapped(cause)
    if isinstance(root, RaytrainAdvError):
        return root
    others = [r for r in failures if r != rank]
    found = _last_lines(cause) + (f"\nworkers {others} failed with it" if others else "")
    fix = "run again with resume_from_checkpoint: true; max_failures: N restarts by itself"
    return TrainingError(_what(rank, root), found, fix)


def _in_a_sentence(failures: Mapping[int, Exception]) -> str:
    rank, cause = _first_cause(failures)
    root = unwrapped(cause)
    if isinstance(root, RaytrainAdvError):
        return f"{root.what}: {root.found.splitlines()[0]}" if root.found else root.what
    if isinstance(root, RayActorError):
        return _what(rank, root)
    return f"{_what(rank, root)}: {_last_lines(cause).splitlines()[-1]}"


def _first_cause(failures: Mapping[int, Exception]) -> tuple[int, Exception]:
    """Return the failure that tells most, and its rank: an error of the house, what is not
    collateral, the lowest rank.
    """

    def order(item: tuple[int, Exception]) -> tuple[bool, bool, int]:
        rank, error = item
        return not isinstance(unwrapped(error), RaytrainAdvError), _is_collateral(error), rank

    return min(failures.items(), key=order)


def _what(rank: int, root: BaseException) -> str:
    return f"Worker {rank} {'died' if isinstance(root, RayActorError) else 'failed'}"


def _is_collateral(error: Exception) -> bool:
    if isinstance(unwrapped(error), RayActorError):
        return False
    return any(sign in str(error) for sign in COLLATERAL)


def _last_lines(error: BaseException) -> str:
    root = unwrapped(error)
    notes = getattr(root, "__notes__", [])  # the innermost frames, as ray_worker adds them
    text = "\n".join([*notes, f"{type(root).__name__}: {root}"]) if notes else str(error)
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return "\n".join(lines[-LAST_LINES:]) or type(error).__name__
