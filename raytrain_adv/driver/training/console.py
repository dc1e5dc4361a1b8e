"""The live view of a run: a table with bar and ETA on a terminal, plain lines in a log."""

import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console as Terminal
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from raytrain_adv import text
from raytrain_adv.driver.training.job_message import JobMessage
from raytrain_adv.driver.watch.nodes import poll
from raytrain_adv.redaction import hide_environment
from raytrain_adv.storage.metrics_file import FILE_NAME, FollowedFile

# Events for programs: the bar or the next row shows them; the driver has printed those of data.
SILENT_EVENTS = frozenset({"plan", "data"})
NUM_SHOWN = 8
REDRAW_S = 1.0  # shortest time between two redraws: a terminal that is recorded keeps each of them
HEADS = ("step", "epoch", "loss", "lr", "grad", "tok/s", "MFU", "mem GiB", "wait")
BY_IMPORTANCE = ("step", "loss", "tok/s", "lr", "epoch", "grad", "MFU", "mem GiB", "wait")
"""A narrow terminal loses the last ones first."""
COLUMN_WIDTH = 8.5
MIN_BAR_WIDTH = 12
Row = Mapping[str, Any]


@dataclass
class Progress:
    """The run so far, from the rows of metrics.jsonl. Times are unix seconds."""

    total_steps: int | None = None
    step: int = 0  # last finished optimizer step
    started: float = field(default_factory=time.time)
    phase: str = "starting"
    phase_started: float = field(default_factory=time.time)
    shown: deque[Row] = field(default_factory=lambda: deque(maxlen=NUM_SHOWN))
    """The last train and eval rows; each train row has its `wait_share`."""
    pace: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=20))
    """Time and step of the last train rows of this start of the workers."""
    step_s: float | None = None

    def take(self, row: Row) -> Row:
        """Add one row of metrics.jsonl; return it, a train row with its `wait_share`."""
        if row["kind"] == "event":
            self._take_event(row)
            return row
        if row["kind"] == "train":
            row = {**row, "wait_share": wait_share(row, self.step)}
            self.step = row["step"]
            self.pace.append((row.get("time") or time.time(), self.step))
            self.step_s = row.get("step_s")
        self.shown.append(row)
        return row

    def eta_s(self) -> float | None:
        """Return the seconds until the last step at the recent pace, evaluations included."""
        if self.total_steps is None or not self.pace:
            return None
        paces = [
            (time_after - time_before) / (step - before)
            for (time_before, before), (time_after, step) in pairwise(self.pace)
            if step > before
        ]
        per_step = statistics.fmean(paces) if paces else self.step_s
        left = self.total_steps - self.step
        return None if per_step is None else max(left * per_step, 0.0)

    def sentence(self) -> str:
        """Return the run in one line: step, loss and time left, or its phase before the first."""
        trained = next((row for row in reversed(self.shown) if row["kind"] == "train"), None)
        if trained is None:
            return self.phase
        eta = self.eta_s()
        words = [
            f"step {of_total(self.step, self.total_steps).strip()}",
            f"loss {text.loss(value(trained, 'loss'))}",
            f"{text.clock(eta)} left" if eta else "",
            self.phase if self.phase != "training" else "",
        ]
        return ", ".join(filter(None, words))

    def _take_event(self, row: Row) -> None:
        match row.get("event"):
            case "plan":
                self.total_steps = row.get("total_steps") or self.total_steps
                self.step = row.get("resumed_from_step") or self.step
            case "resume":
                self.step = row.get("step") or 0
                self.pace.clear()
            case "phase":
                self.phase, self.phase_started = str(row.get("message")), time.time()


class Console:
    """Shows a run in its driver's terminal or log while the `with` block lasts.

    A thread follows output_dir/metrics.jsonl, which rank 0 writes on storage that the driver
    shares. The view never stops the run: its own error is printed once, and training continues. If
    `stream`, by default stdout, is a terminal, it gets the table, anything else lines. Time passes
    since `began`, in unix seconds; since now if none.
    """

    def __init__(
        self,
        output_dir: str | Path,
        stream: TextIO | None = None,
        poll_s: float = 0.5,
        began: float | None = None,
    ) -> None:
        self._stream = stream or sys.stdout
        self._progress = Progress(started=began or time.time())
        self._file = FollowedFile(Path(output_dir) / FILE_NAME)
        self._lock = threading.RLock()
        self._stopped = False
        self._nobody_reads = False
        self._live: Live | None = None
        self._drawn_at = -REDRAW_S
        self._drawn: list[str] = []
        self._job_message = JobMessage(self._print)
        self._follow = poll("live view", self._update, poll_s)
        self._following = ExitStack()

    def __enter__(self) -> "Console":
        self._file.new_rows()  # rows of an earlier start were shown then
        if self._stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown"):
            self._live = _start_live(self._stream)
        self._following.enter_context(self._follow)
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._following.close()
            self._update(closing=True)
        finally:
            if self._live is not None:
                self._live.stop()
                self._live = None

    def say(self, message: str) -> None:
        """Print a message, above the table if there is one."""
        with self._lock:
            self._print(message)

    def _update(self, closing: bool = False) -> None:
        if self._stopped:
            return
        try:
            with self._lock:
                for row in self._file.new_rows():
                    self._show(self._progress.take(row))
                if self._live is not None:
                    self._draw(self._live, closing)
            if not closing:
                self._job_message.tell(self._progress.sentence())
        except Exception as error:  # noqa: BLE001 # a closed terminal, a row of another version:
            # it must neither end a training run of days nor go unseen.
            self._stopped = True
            reason = f"{type(error).__name__}: {error}"
            self._print(f"The live view stopped ({reason}); the run continues, see {FILE_NAME}.")

    def _show(self, row: Row) -> None:
        if row["kind"] != "event":
            if self._live is None:
                self._print(log_line(row, self._progress))
        elif row.get("event") not in SILENT_EVENTS:
            style = "dim" if row.get("event") == "phase" else ""
            self._print(str(row.get("message")), style=style, stamped=True)

    def _draw(self, live: Live, closing: bool) -> None:
        """Draw the view if it has changed, at most once in REDRAW_S until the run ends."""
        now = time.monotonic()
        if now - self._drawn_at < REDRAW_S and not closing:
            return
        view = live_view(self._progress, *live.console.size)
        if closing and not self._progress.shown:
            view = Text("")
        lines = [str(line) for line in live.console.render_lines(view, pad=False)]
        if lines != self._drawn:
            self._drawn_at, self._drawn = now, lines
            live.update(view, refresh=True)

    def _print(self, message: str, style: str = "", stamped: bool = False) -> None:
        if self._nobody_reads:
            return
        if stamped:
            message = f"[{text.clock(time.time() - self._progress.started)}] {message}"
        shown = printable(hide_environment(message), self._stream.encoding)
        try:
            if self._live is not None:
                self._live.console.print(Text(shown, style=style), soft_wrap=True)
            else:
                self._stream.write(shown + "\n")
                self._stream.flush()
        except (OSError, ValueError):
            self._nobody_reads = True  # the reader of the pipe is gone, or the stream is closed


def printable(message: str, encoding: str | None) -> str:
    """Return the message without control characters, in characters that the encoding has."""
    encoding = encoding or "utf-8"
    return text.clean(message).encode(encoding, errors="backslashreplace").decode(encoding)


def _start_live(stream: TextIO) -> Live:
    terminal = Terminal(file=stream, force_terminal=True, highlight=False, markup=False)
    live = Live(Text(""), console=terminal, auto_refresh=False, vertical_overflow="crop")
    live.start()
    terminal.show_cursor(True)  # rich hides it; a run that is killed could not show it again
    return live


def live_view(progress: Progress, width: int, height: int) -> RenderableType:
    """Return the last rows as a table, and below it the bar or the phase, for a terminal's size."""
    # Bar, head, rule and a line for the prompt take five lines.
    rows = list(progress.shown)[-max(height - 5, 1) :]
    phase = Text(f"{progress.phase}  {text.clock(time.time() - progress.phase_started)}")
    below = _bar(progress, width) if progress.pace else phase
    return Group(_table(progress, rows, width), below) if rows else below


def _table(progress: Progress, rows: list[Row], width: int) -> Table:
    kept = BY_IMPORTANCE[: max(int(width / COLUMN_WIDTH), 3)]
    heads = [head for head in HEADS if head in kept]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        cells = _cells(row, progress)
        style = "cyan" if row["kind"] == "eval" else ""
        table.add_row(*(Text(cells[head]) for head in heads), style=style)
    return table


def _bar(progress: Progress, width: int) -> RenderableType:
    passed = f"{text.clock(time.time() - progress.started)} passed"
    if progress.total_steps is None:
        return Text(f"step {progress.step:,}  {passed}")
    eta = progress.eta_s()
    left = [f"{text.clock(eta)} left"] if eta else []
    phase = [progress.phase] if progress.phase != "training" else []
    words = [f"{progress.step / progress.total_steps:4.0%}", *left, passed, *phase]
    while len(words) > 1 and len("  ".join(words)) > width - MIN_BAR_WIDTH - 4:
        words.pop()
    label = Text("  ".join(words), no_wrap=True)
    bar_width = width - len(label) - 4
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_row(ProgressBar(progress.total_steps, progress.step, width=bar_width), label)
    return grid


def _cells(row: Row, progress: Progress) -> dict[str, str]:
    step, loss = of_total(row["step"], progress.total_steps), text.loss(value(row, "loss"))
    if row["kind"] == "eval":
        return dict.fromkeys(HEADS, "") | {
            "step": step,
            "epoch": "eval",
            "loss": loss,
            "lr": f"ppl {text.compact(value(row, 'perplexity'))}",
            "grad": text.seconds(row.get("seconds")),
            "tok/s": str(row.get("how", "")),
        }
    epoch = value(row, "epoch")
    return {
        "step": step,
        "epoch": text.MISSING if epoch is None else f"{epoch:.2f}",
        "loss": loss,
        "lr": text.learning_rate(value(row, "learning_rate")),
        "grad": text.compact(value(row, "grad_norm")),
        "tok/s": text.rate(value(row, "tokens_per_second_per_worker")),
        "MFU": text.percent(value(row, "mfu_bf16")),
        "mem GiB": text.gib(value(row, "peak_memory_gib")),
        "wait": text.percent(row.get("wait_share")),
    }


def log_line(row: Row, progress: Progress) -> str:
    """Return a train or eval row as one aligned line for a log; cut and grep can split it."""
    cells = _cells(row, progress)
    if row["kind"] == "eval":
        perplexity = text.compact(value(row, "perplexity"))
        tokens = text.count(row.get("num_label_tokens"))
        figures = f"eval {cells['step']}  loss {cells['loss']}  perplexity {perplexity}"
        exact = value(row, "exact_answers")
        right = "" if exact is None else f"{exact:.1%} of {row.get('num_answers')} answers exact"
        accuracy = value(row, "accuracy")
        shares = "" if accuracy is None else f"{accuracy:.1%} of tokens right"
        apart = [k.removeprefix("loss/") for k in row if k.startswith("loss/")]  # of each dataset
        losses = ", ".join(f"{name} {text.loss(value(row, f'loss/{name}'))}" for name in apart)
        figures += f"  ({losses})" if losses else ""
        parts = (figures, shares, right, f"{tokens} label tokens", cells["grad"], cells["tok/s"])
        return "  ".join(filter(None, parts))
    form = (
        "step {step}  epoch {epoch}  loss {loss}  lr {lr}  grad {grad:>5}  {tok/s:>7} tok/s/worker"
        "  mfu {MFU}  mem {mem GiB} GiB  wait {wait}  eta {eta}"
    )
    return form.format(**cells, eta=text.clock(progress.eta_s()))


def wait_share(row: Row, previous_step: int) -> float | None:
    """Return the share of time since the last train row that workers waited for data, at most 1."""
    waited, step_s = row.get("data_wait_s"), row.get("step_s")
    if waited is None or not step_s:
        return None
    num_steps = max(int(row["step"]) - previous_step, 1)
    return min(float(waited) / (float(step_s) * num_steps), 1.0)


def value(row: Row, key: str) -> float | None:
    """Return a number of the row, also NaN and infinity, which it has under non_finite."""
    number = row.get(key)
    number = row.get("non_finite", {}).get(key) if number is None else number
    return None if number is None else float(number)


def of_total(step: int, total_steps: int | None) -> str:
    """Return the step as ` 20/600`, aligned."""
    return str(step) if total_steps is None else f"{step:>{len(str(total_steps))}}/{total_steps}"
