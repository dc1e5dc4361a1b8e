"""Storage that fails for a while: what was asked of it is asked again, and said."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch.distributed.checkpoint.api import CheckpointException

from raytrain_adv.errors import StorageError

T = TypeVar("T")

WAITS_S = (1.0, 5.0, 20.0)
"""Seconds before each further attempt."""
# What another attempt meets again: no room, no permission, something else in the place.
IN_VAIN = frozenset(
    (
        errno.EACCES,
        errno.EDQUOT,
        errno.EEXIST,
        errno.EFBIG,
        errno.EISDIR,
        errno.ENAMETOOLONG,
        errno.ENOSPC,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
    )
)
_NUMBER = re.compile(r"\[errno (\d+)\]", re.IGNORECASE)


def persistently(
    work: Callable[[], T],
    what: str,
    say: Callable[[str], None],
    waits_s: Sequence[float] = WAITS_S,
) -> T:
    """Do the work, and again where storage has failed in a way that may pass.

    What all ranks do together (DCP's writing) is done again by all or by none: its exception holds
    every rank's failure, so that each decides the same.

    Args:
        work: what is done; it may be begun anew after it has failed.
        what: what has happened when it fails, for the message.
        say: tells the user a sentence.
        waits_s: seconds before each further attempt.
    """
    for wait_s in waits_s:
        try:
            return work()
        except (OSError, StorageError, CheckpointException) as error:
            if not may_pass(error):
                raise
            say(f"{what} ({cause(error)}); trying again in {wait_s:g} s")
            time.sleep(wait_s)
    return work()


def may_pass(error: BaseException) -> bool:
    """Whether storage has failed in a way that another attempt may not meet."""
    if isinstance(error, StorageError):
        return error.__cause__ is not None and may_pass(error.__cause__)
    numbers = {int(found) for found in _NUMBER.findall(str(error))}
    if isinstance(error, CheckpointException):
        inner = [failure for failure, _ in error.failures.values()]
        of_storage = all(isinstance(e, OSError) or _NUMBER.search(str(error)) for e in inner)
        numbers |= {e.errno for e in inner if isinstance(e, OSError) and e.errno is not None}
        return of_storage and not numbers & IN_VAIN
    if isinstance(error, OSError) and error.errno is not None:
        numbers.add(error.errno)
    return isinstance(error, OSError) and not numbers & IN_VAIN


def cause(error: BaseException) -> str:
    """Return the innermost reason; DCP wraps what each rank met in one exception, and torch's file
    writer follows the operating system's refusal with its own.
    """
    lines = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()
    return next((line.strip() for line in lines if _NUMBER.search(line)), lines[-1])
