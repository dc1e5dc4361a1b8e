"""Retry operations on storage that fails for a while."""

import errno
import re
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from raytrain_adv.errors import StorageError

T = TypeVar("T")

WAITS_S = (1.0, 5.0, 20.0)  # seconds before each further attempt
# Another attempt fails the same way: no space, no permission, a file in the way.
PERMANENT = frozenset((
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EISDIR, errno.ENAMETOOLONG,
    errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS,
))  # fmt: skip
_NUMBER = re.compile(r"\[errno (\d+)\]", re.IGNORECASE)


def may_be_temporary(error: BaseException) -> bool:
    """Whether another attempt may succeed."""
    if isinstance(error, StorageError):
        return error.__cause__ is not None and may_be_temporary(error.__cause__)
    numbers = {int(found) for found in _NUMBER.findall(str(error))}
    if failures := _failures(error):
        inner = [failure for failure, _ in failures.values()]
        of_storage = all(isinstance(e, OSError) or _NUMBER.search(str(error)) for e in inner)
        numbers |= {e.errno for e in inner if isinstance(e, OSError) and e.errno is not None}
        return of_storage and not numbers & PERMANENT
    if isinstance(error, OSError) and error.errno is not None:
        numbers.add(error.errno)
    return isinstance(error, OSError) and not numbers & PERMANENT


def _failures(error: BaseException) -> dict[int, tuple[BaseException, object]]:
    """Return the failure of each rank in DCP's CheckpointException, which is no Exception, and
    whose import would be PyTorch's (torch 2.11 to 2.13).
    """
    is_dcp = type(error).__name__ == "CheckpointException"
    return getattr(error, "failures", {}) if is_dcp else {}


def cause(error: BaseException) -> str:
    """Return the innermost reason: DCP and torch's file writer wrap the operating system's."""
    lines = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()
    return next((line.strip() for line in lines if _NUMBER.search(line)), lines[-1])


def retry(
    work: Callable[[], T],
    what: str,
    say: Callable[[str], None],
    waits_s: Sequence[float] = WAITS_S,
    is_temporary: Callable[[BaseException], bool] = may_be_temporary,
    reason: Callable[[BaseException], str] = cause,
) -> T:
    """Do the work, and repeat it after failures that may be temporary, by default those of storage;
    `what` failed, for the message. All ranks repeat collective work or none: DCP's exception holds
    every rank's failure.
    """
    for wait_s in waits_s:
        try:
            return work()
        # Raised again unless another attempt may succeed; DCP's exception is no Exception.
        except BaseException as error:
            if not is_temporary(error):
                raise
            say(f"{what} ({reason(error)}); trying again in {wait_s:g} s")
            time.sleep(wait_s)
    return work()
