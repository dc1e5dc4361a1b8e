"""What a file from elsewhere may cost: the time of a chat template."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from raytrain_adv.errors import JobError, RaytrainAdvError, no_panics

SECONDS = 60.0  # for the conversations of one chunk, which take a second
MOST_CHARACTERS = 2**22
"""Of a row, or 64 for each token of cutoff_len if that is more: 5 GB went into a row of 50 MB."""

MOST_MESSAGES = 10_000
"""Of a row, or one for each token of cutoff_len if that is more: a template writes them in 1 s."""


class _Expired(BaseException):
    """Raised in a thread whose time is over."""


@contextmanager
def template_time(where: str, seconds: float = SECONDS) -> Iterator[None]:
    """Stop a chat template whose loops take too long.

    Jinja's sandbox bounds one range, and not loops in loops. They are Python's, so that an
    exception set from another thread ends them. Raises JobError when the time is over.
    """
    me, has_ended = threading.get_ident(), threading.Event()

    def expire() -> None:
        if not has_ended.is_set():
            exception = ctypes.py_object(_Expired)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(me), exception)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
        has_ended.set()
    except _Expired:
        raise JobError(
            "The chat template takes too long",
            f"more than {seconds:g} s: {where}",
            "set template in the job, or correct chat_template in the tokenizer's folder",
        ) from None
    finally:
        has_ended.set()
        timer.cancel()


@contextmanager
def tokenizer_errors(what: str) -> Iterator[None]:
    """Turn whatever a tokenizer raises on `what`, also a crash in Rust, into an error. Settings of
    its files are read only now: a model_max_length that is text compares to no number. Raises
    JobError when it raises anything but an error of ours.
    """
    try:
        with no_panics(what):
            yield
    except (RaytrainAdvError, MemoryError):
        raise
    except Exception as error:  # files of others, read by code for each kind of tokenizer
        raise JobError(
            f"The tokenizer fails on {what}",
            f"{type(error).__name__}: {error}"[:600],
            "correct tokenizer_config.json and tokenizer.json, or copy the model's again",
        ) from error
