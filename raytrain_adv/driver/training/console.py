"""The live view of a run: a table with bar and ETA on a terminal, plain lines in a log."""

import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console as Terminal
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from raytrain_adv import text as numbers
from raytrain_adv.driver.training.live_table import live_view
from raytrain_adv.driver.training.progress import Progress, Row, log_line
from raytrain_adv.redaction import hide_environment
from raytrain_adv.report.summary import summary
from raytrain_adv.storage.metrics_file import FILE_NAME, FollowedFile

__all__ = ["Console", "summary"]

# Events that are for programs: what they say is in the bar or follows as a row, or, of data, the
# driver has said it when it prepared them.
SILENT_EVENTS = frozenset({"plan", "data"})


class Console:
    """Shows a run to whoever started it, for as long as the `with` block lasts.

    A thread follows output_dir/metrics.jsonl, which rank 0 writes on storage that the driver
    shares. The view never stops the run: what goes wrong in it is said once, and training goes on.

    Args:
        output_dir: folder of the run.
        total_steps: optimizer steps in all; where it is not known yet, an event `plan` with
            total_steps brings it. stream: where to write; stdout if none. A terminal gets the
            table, anything else lines. poll_s: seconds between two looks at the file.
    """

    def __init__(
        self,
        output_dir: str | Path,
        total_steps: int | None = None,
        stream: TextIO | None = None,
        poll_s: float = 0.5,
    ) -> None:
        self._stream = stream or sys.stdout
        self._poll_s = poll_s
        self._progress = Progress(total_steps=total_steps)
        self._file = FollowedFile(Path(output_dir) / FILE_NAME)
        self._lock = threading.RLock()
        self._finished = threading.Event()
        self._stopped = False
        self._nobody_reads = False
        self._live: Live | None = None
        self._spinner = Spinner("dots")
        self._thread = threading.Thread(target=self._follow, name="live view", daemon=True)

    def __enter__(self) -> "Console":
        # What an earlier start of the run has written was shown then.
        self._file.new_rows()
        if is_terminal(self._stream):
            self._live = _start_live(self._stream)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._finished.set()
            self._thread.join(timeout=5.0)
            self._update(closing=True)
        finally:
            if self._live is not None:
                self._live.stop()
                self._live = None

    def say(self, text: str) -> None:
        """Print a message, above the table where there is one."""
        with self._lock:
            self._print(text)

    def phase(self, name: str) -> None:
        """Say what the run does now; the view shows it, and for how long, until the next phase."""
        with self._lock:
            self._progress.begin_phase(name)
            self._print(self._stamped(name), style="dim")

    def _follow(self) -> None:
        while not self._finished.wait(self._poll_s):
            self._update()

    def _update(self, closing: bool = False) -> None:
        """Take in new rows and show them."""
        if self._stopped:
            return
        try:
            with self._lock:
                for row in self._file.new_rows():
                    self._show(self._progress.take(row))
                if self._live is not None:
                    self._draw(self._live, closing)
        except Exception as error:
            # Whatever fails here (a closed terminal, a row that no version of this code wrote) must
            # neither end a training run of days nor go unseen.
            self._give_up(error)

    def _show(self, row: Row) -> None:
        if row["kind"] == "event":
            if row.get("event") not in SILENT_EVENTS:
                style = "dim" if row.get("event") == "phase" else ""
                self._print(self._stamped(str(row.get("message"))), style=style)
        elif self._live is None:
            self._print(log_line(row, self._progress))

    def _draw(self, live: Live, closing: bool) -> None:
        size = live.console.size
        view = live_view(self._progress, self._spinner, size.width, size.height)
        if closing and not self._progress.shown:
            view = Text("")
        live.update(view, refresh=True)

    def _stamped(self, text: str) -> str:
        return f"[{numbers.clock(time.time() - self._progress.started)}] {text}"

    def _print(self, text: str, style: str = "") -> None:
        if self._nobody_reads:
            return
        shown = printable(hide_environment(text), self._stream.encoding)
        try:
            if self._live is not None:
                self._live.console.print(Text(shown, style=style), soft_wrap=True)
            else:
                self._stream.write(shown + "\n")
                self._stream.flush()
        except (OSError, ValueError):
            # The reader of a pipe is gone, or the stream is closed: nobody is there to be told.
            self._nobody_reads = True

    def _give_up(self, error: Exception) -> None:
        self._finished.set()
        self._stopped = True
        reason = f"{type(error).__name__}: {error}"
        self._print(f"The live view stopped ({reason}); the run goes on, see {FILE_NAME}.")


def is_terminal(stream: TextIO) -> bool:
    """Whether the stream is a terminal that can redraw lines."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def printable(text: str, encoding: str | None) -> str:
    """Return the text without control characters, in characters that the encoding has."""
    clean = "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    encoding = encoding or "utf-8"
    return clean.encode(encoding, errors="backslashreplace").decode(encoding)


def _start_live(stream: TextIO) -> Live:
    terminal = Terminal(file=stream, force_terminal=True, highlight=False, markup=False)
    live = Live(Text(""), console=terminal, auto_refresh=False, vertical_overflow="crop")
    live.start()
    # Rich hides the cursor; a run that is killed could not show it again.
    terminal.show_cursor(True)
    return live
