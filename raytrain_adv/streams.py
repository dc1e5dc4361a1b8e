"""A run's standard streams, whatever the caller did with them: closed, or a pipe nobody reads."""

import io
import os
import sys
from typing import Any


def open_closed_streams() -> None:
    """Open what the caller closed, as by `>&-`: Python has None there, on which a run's console
    failed, and the next file that is opened has its number, into which processes would print.
    """
    for name in ("stdin", "stdout", "stderr"):  # each opens the lowest number that is free
        if getattr(sys, name) is None:
            nothing = open(os.devnull, "r+", encoding="utf-8")  # noqa: SIM115 # to the end
            os.set_inheritable(nothing.fileno(), True)
            setattr(sys, name, nothing)


class Patient(io.FileIO):
    """A file that drops what cannot be written: its reader is gone, or its disk is full."""

    def write(self, data: Any) -> int:
        """Return the number of bytes, written or not."""
        try:
            return super().write(data)
        except OSError:
            return len(data)


def outlast_the_reader() -> None:
    """Go on when nobody reads stdout any more, as with `| head`: what a command trains is worth
    more than what it prints. A stdout that is not the process's own stays.
    """
    before = sys.stdout
    if before is not sys.__stdout__ or not isinstance(before, io.TextIOWrapper):
        return
    before.flush()
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(Patient(before.fileno(), "w", closefd=False)),
        encoding=before.encoding,
        errors=before.errors,
        line_buffering=before.line_buffering,
        write_through=before.write_through,
    )
