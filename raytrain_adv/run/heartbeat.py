"""A worker's progress, readable by other threads while its training thread hangs."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

# Where a thread stands that waits for other workers, and what may lie between it and the wait.
_COLLECTIVES = "torch/distributed/"
_BETWEEN = ("torch/_ops.py", "torch/utils/_contextlib.py")


@dataclass(frozen=True)
class Pulse:
    """A worker's progress at one time."""

    step: int  # optimizer steps of this start that it has finished
    stalled_s: float  # seconds since it last finished one; 0 while time does not count
    place: str  # the line of code at which its training thread is
    waits: bool  # whether that is a wait for other workers


@dataclass
class Heartbeat:
    """Counts optimizer steps; time runs from the end of the first, except inside `paused`."""

    thread: int = field(default_factory=threading.get_ident)  # the training thread
    step: int = 0
    _since: float | None = None  # time.monotonic of the last step's end; None: time does not count

    def step_done(self) -> None:
        """Count a finished step."""
        self.step += 1
        self._since = time.monotonic()

    def stop(self) -> None:
        """Stop expecting steps."""
        self._since = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the time during long work between two steps."""
        counted, self._since = self._since is not None, None
        yield
        self._since = time.monotonic() if counted else None

    def pulse(self) -> Pulse:
        """Return the training thread's progress; called by another thread."""
        since = self._since
        stalled_s = 0.0 if since is None else time.monotonic() - since
        frame = sys._current_frames().get(self.thread)
        return Pulse(self.step, stalled_s, _place(frame), _waits(frame))


def _place(frame: FrameType | None) -> str:
    """Return the innermost line that is not of a library, and the innermost of all."""
    innermost = own = frame
    while own is not None and own.f_back is not None and "site-packages" in own.f_code.co_filename:
        own = own.f_back
    lines = [_line(f) for f in (own, innermost) if f is not None]
    return " -> ".join(dict.fromkeys(lines)) or "its training thread has ended"


def _line(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno} {frame.f_code.co_name}"


def _waits(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename.endswith(_BETWEEN):
        frame = frame.f_back
    return frame is not None and _COLLECTIVES in frame.f_code.co_filename
