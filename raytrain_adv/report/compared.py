"""Several runs laid over each other: their curves, and where their keys and results differ."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrain_adv import text
from raytrain_adv.config.job import FREE_TO_CHANGE
from raytrain_adv.config.sweep import CONVERTED_LOSS
from raytrain_adv.report import charts, record
from raytrain_adv.report.html import page
from raytrain_adv.report.plot import NUM_COLORS, Plot, Series, draw
from raytrain_adv.report.record import RunReport
from raytrain_adv.report.summary import columns
from raytrain_adv.storage import metrics_file

CURVES: tuple[tuple[str, str, str, str, Any], ...] = (
    ("Training loss", "per label token", "train", "loss", "wide"),
    ("Eval loss", "per label token", "eval", "loss", "wide"),
    ("Exact answers", "share", "eval", "exact_answers", "half"),
    ("Gradient norm", "before clipping", "train", "grad_norm", "half"),
    ("Learning rate", "", "train", "learning_rate", "half"),
    ("Speed", "tokens/s per worker", "train", "tokens_per_second_per_worker", "half"),
    ("Peak memory", "GiB, rank 0", "train", "peak_memory_gib", "half"),
    ("CPU", "% of the node of rank 0", "train", "cpu_percent", "half"),
    ("Host memory in use", "% of the node of rank 0", "train", "host_memory_percent", "half"),
    ("GPU", "% of the time, rank 0", "train", "gpu_percent", "half"),
    ("GPU power", "W, rank 0", "train", "gpu_watts", "half"),
)
"""Title, unit, kind of row, key and width of each plot; those without points are not drawn."""
RESULTS: dict[str, Callable[[Any], str]] = {
    "status": str,
    "steps": text.count,
    "eval_loss": text.loss,
    "train_loss": text.loss,
    "exact_answers": text.percent,
    CONVERTED_LOSS: text.loss,
    "tokens_per_second_per_worker": text.rate,
    "peak_memory_gib": text.gib,
    "seconds": text.clock,
}
NAMES = {
    "tokens_per_second_per_worker": "tokens/s per worker",
    "peak_memory_gib": "peak memory, GiB",
    "seconds": "time",
}


@dataclass(frozen=True)
class Compared:
    """One run: its name among the others, its report, and its rows of metrics.jsonl."""

    name: str
    report: RunReport
    rows: Sequence[Mapping[str, Any]]


def read_runs(folders: Sequence[Path]) -> list[Compared]:
    """Read the runs in these output folders; their names tell them apart. Raises StorageError."""
    names = distinct([folder.resolve() for folder in folders])
    return [
        Compared(name, record.read(folder), metrics_file.read(folder / metrics_file.FILE_NAME))
        for name, folder in zip(names, folders, strict=True)
    ]


def distinct(folders: Sequence[Path]) -> list[str]:
    """Return as many last parts of each path as it takes to tell them apart; x/previous/1 of a run
    that was kept.
    """
    kept = [2 if folder.name.isdigit() else 0 for folder in folders]
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        lasts = [-depth - more for more in kept]
        names = ["/".join(folder.parts[last:]) for folder, last in zip(folders, lasts, strict=True)]
        if len(set(names)) == len(names):
            return names
    return [f"{folder} ({number})" for number, folder in enumerate(folders, 1)]


def curves(runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> list[Plot]:
    """Return a plot of each measure with a line for each run, given its name and rows."""
    colors = list(itertools.islice(itertools.cycle(range(1, NUM_COLORS + 1)), len(runs)))
    plots = []
    for title, unit, kind, key, span in CURVES:
        lines: list[Series] = []
        for color, (name, rows) in zip(colors, runs, strict=True):
            points = [
                (r["step"], float(r[key]))
                for r in rows
                if r["kind"] == kind and r.get(key) is not None
            ]
            if (kind, key) == ("train", "loss") and len(points) >= charts.MIN_POINTS_TO_SMOOTH:
                lines.append(Series(f"{name}, each row", points, color, "faint"))
                points = charts.smoothed(points)
            lines.append(Series(name, points, color, "dots" if kind == "eval" else "line"))
        plots.append(Plot(title, unit, tuple(lines), span=span))
    return plots


def differing_keys(runs: Sequence[Compared]) -> list[tuple[str, ...]]:
    """Return a row for each key that differs: its name, then each run's value. Those that change
    what is computed come first.
    """
    every = dict.fromkeys(key for run in runs for key in run.report.job)
    rows = []
    for key in every:
        values = [run.report.job.get(key) for run in runs]
        if len({json.dumps(value, sort_keys=True) for value in values}) > 1:
            rows.append((key, *(text.as_yaml(value) for value in values)))
    return sorted(rows, key=lambda row: (row[0] in FREE_TO_CHANGE, row[0]))


def results(runs: Sequence[Compared]) -> list[tuple[str, ...]]:
    """Return a row for each result: its name, then each run's; without those that none has."""
    rows = []
    for name, form in RESULTS.items():
        found = [getattr(run.report, name) for run in runs]
        found = [value[-1][1] if isinstance(value, tuple) and value else value for value in found]
        if any(value not in (None, ()) for value in found):
            shown = (text.MISSING if v in (None, ()) else form(v) for v in found)
            rows.append((NAMES.get(name, name.replace("_", " ")), *shown))
    return rows


def render(runs: Sequence[Compared]) -> str:
    """Return the document."""
    names = [run.name for run in runs]
    return page(
        "compared.html.j2",
        title=f"{len(runs)} runs",
        subtitle=names,
        heads=("", *names),
        results=results(runs),
        keys=differing_keys(runs),
        drawings=draw(curves([(run.name, run.rows) for run in runs])),
        warnings=[f"{run.name}: {one}" for run in runs for one in run.report.warnings],
    )


def render_text(runs: Sequence[Compared]) -> str:
    """Return the two tables for the console."""
    heads = ("", *(run.name for run in runs))
    parts = [columns([heads, *results(runs)], num_left=1)]
    if keys := differing_keys(runs):
        parts.append(columns([("keys that differ", *heads[1:]), *keys], num_left=1))
    return "\n\n".join(parts)
