"""The live view on a terminal: the last rows as a table, a bar, the phase the run is in."""

import time

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from raytrain_adv import text as numbers
from raytrain_adv.driver.training.progress import Progress, Row, of_total, value

# Column heads in the order of display, with the number that says how soon a narrow terminal loses
# them (0: never).
COLUMNS = {
    "step": 0,
    "epoch": 3,
    "loss": 0,
    "lr": 2,
    "grad": 4,
    "tok/s": 0,
    "MFU": 5,
    "mem GiB": 6,
    "wait": 7,
}
COLUMN_WIDTH = 8.5
MIN_BAR_WIDTH = 12


def live_view(progress: Progress, spinner: Spinner, width: int, height: int) -> RenderableType:
    """Return what stands at the bottom of a terminal of this size while the run goes on."""
    parts: list[RenderableType] = []
    # Bar, head, rule and a line for the prompt take five lines.
    rows = list(progress.shown)[-max(height - 5, 1) :]
    if rows:
        parts.append(_table(progress, rows, width))
    parts.append(_bar(progress, width) if progress.pace else _phase(progress, spinner))
    return Group(*parts)


def _table(progress: Progress, rows: list[Row], width: int) -> Table:
    heads = _heads_that_fit(width)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        cells = _eval_cells(row, progress) if row["kind"] == "eval" else _train_cells(row, progress)
        style = "cyan" if row["kind"] == "eval" else ""
        table.add_row(*(Text(cells.get(head, "")) for head in heads), style=style)
    return table


def _heads_that_fit(width: int) -> list[str]:
    num_fitting = max(int(width / COLUMN_WIDTH), 3)
    by_importance = sorted(COLUMNS, key=lambda head: COLUMNS[head])
    kept = set(by_importance[:num_fitting])
    return [head for head in COLUMNS if head in kept]


def _train_cells(row: Row, progress: Progress) -> dict[str, str]:
    epoch = value(row, "epoch")
    return {
        "step": of_total(row["step"], progress.total_steps),
        "epoch": numbers.MISSING if epoch is None else f"{epoch:.2f}",
        "loss": numbers.loss(value(row, "loss")),
        "lr": numbers.learning_rate(value(row, "learning_rate")),
        "grad": numbers.compact(value(row, "grad_norm")),
        "tok/s": numbers.rate(value(row, "tokens_per_second_per_worker")),
        "MFU": numbers.percent(value(row, "mfu_bf16")),
        "mem GiB": numbers.gib(value(row, "peak_memory_gib")),
        "wait": numbers.percent(row.get("wait_share")),
    }


def _eval_cells(row: Row, progress: Progress) -> dict[str, str]:
    return {
        "step": of_total(row["step"], progress.total_steps),
        "epoch": "eval",
        "loss": numbers.loss(value(row, "loss")),
        "lr": f"ppl {numbers.compact(value(row, 'perplexity'))}",
        "grad": numbers.seconds(row.get("seconds")),
        "tok/s": str(row.get("how", "")),
    }


def _bar(progress: Progress, width: int) -> RenderableType:
    passed = f"{numbers.clock(time.time() - progress.started)} passed"
    if progress.total_steps is None:
        return Text(f"step {progress.step:,}  {passed}")
    eta = progress.eta_s()
    words = [f"{progress.step / progress.total_steps:4.0%}", passed]
    if eta:
        words.insert(1, f"{numbers.clock(eta)} left")
    if progress.phase != "training":
        words.append(progress.phase)
    while len(words) > 1 and len("  ".join(words)) > width - MIN_BAR_WIDTH - 4:
        words.pop()
    text = "  ".join(words)
    bar_width = width - len(text) - 4
    bar = ProgressBar(total=progress.total_steps, completed=progress.step, width=bar_width)
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_row(bar, Text(text, no_wrap=True))
    return grid


def _phase(progress: Progress, spinner: Spinner) -> RenderableType:
    seconds = numbers.clock(time.time() - progress.phase_started)
    spinner.update(text=Text(f"{progress.phase}  {seconds}"))
    return spinner
