"""The trials of a sweep side by side, as text for the console and as cells for the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raytrain_adv import text as numbers
from raytrain_adv.report.sweep_record import SweepReport, TrialReport

HEADS = {
    "eval_loss": "eval loss",
    "quantized_eval_loss": "quantized eval loss",
    "train_loss": "train loss",
    "tokens_per_second_per_worker": "tokens/s",
    "step_seconds": "step",
    "peak_memory_gib": "peak GiB",
    "mfu_bf16": "MFU",
}
ALWAYS = ("eval_loss", "train_loss", "tokens_per_second_per_worker", "peak_memory_gib")
BEST = "best"
MAX_CELL = 40


def figure(metric: str, value: float | None) -> str:
    """Return a metric's value as it is written for people."""
    if metric == "tokens_per_second_per_worker":
        return numbers.rate(value)
    if metric == "step_seconds":
        return numbers.seconds(value)
    if metric == "peak_memory_gib":
        return numbers.gib(value)
    return numbers.percent(value) if metric == "mfu_bf16" else numbers.loss(value)


def cells(report: SweepReport) -> tuple[list[str], list[list[str]]]:
    """Return the heads and a row for each trial: swept keys, state, the metric, other figures."""
    columns = [report.metric, *(name for name in ALWAYS if name != report.metric)]
    columns = [c for i, c in enumerate(columns) if i == 0 or _any(report.trials, c)]
    heads = [*report.keys, "state", *(HEADS[c] for c in columns), "steps", "time"]
    rows = []
    for trial in report.trials:
        values = [written(trial.values.get(key)) for key in report.keys]
        state = BEST if trial.name == report.best else trial.status
        figures = [figure(report.metric, trial.metric)]
        figures += [figure(c, getattr(trial, c)) for c in columns[1:]]
        rows.append([*values, state, *figures, _steps(trial), numbers.clock(trial.seconds)])
    return heads, rows


def _any(trials: Sequence[TrialReport], column: str) -> bool:
    return any(getattr(t, column) is not None for t in trials)


def _steps(trial: TrialReport) -> str:
    if trial.total_steps in (None, trial.steps):
        return f"{trial.steps:,}"
    return f"{trial.steps:,} of {trial.total_steps:,}"


def written(value: Any) -> str:
    """Return a swept value as YAML would have it, shortened."""
    is_word = value is None or isinstance(value, bool)
    text = {None: "null", True: "true", False: "false"}[value] if is_word else str(value)
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 3]}..."


def render(report: SweepReport) -> str:
    """Return the table, what went wrong below it, and where everything is."""
    heads, rows = cells(report)
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    num_left = len(report.keys) + 1
    lines = ["  ".join(_padded(row, widths, num_left)) for row in [heads, *rows]]
    for trial in report.trials:
        if trial.error:
            lines.append(f"\n{trial.name} {trial.status}:")
            lines += [f"  {line}" for line in trial.error.splitlines()]
    lines.append("")
    if report.best is not None:
        best = report.trial(report.best)
        text = f"{HEADS[report.metric]} {figure(report.metric, best.metric)}"
        lines.append(f"  best      {report.best}: {text}")
        lines.append(f"  its job   {report.best_job}")
    lines.append(f"  report    {report.output_dir}/sweep.html")
    lines.append(f"  figures   {report.output_dir}/sweep.json")
    return "\n".join(lines)


def _padded(row: Sequence[str], widths: Sequence[int], num_left: int) -> list[str]:
    """Align the first num_left cells, which are words, to the left, and numbers to the right."""
    return [
        cell.ljust(width) if i < num_left else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
