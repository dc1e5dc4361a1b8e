"""The trials of a sweep compared, as text for the console and as cells for the page."""

from __future__ import annotations

from typing import Any

from raytrain_adv import text
from raytrain_adv.config.sweep import CONVERTED_LOSS
from raytrain_adv.report.summary import columns
from raytrain_adv.report.sweep_record import SweepReport, TrialReport

HEADS = {
    "eval_loss": "eval loss",
    CONVERTED_LOSS: CONVERTED_LOSS.replace("_", " "),
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
    """Return a metric's value as people read it."""
    if metric == "tokens_per_second_per_worker":
        return text.rate(value)
    if metric == "step_seconds":
        return text.seconds(value)
    if metric == "peak_memory_gib":
        return text.gib(value)
    return text.percent(value) if metric == "mfu_bf16" else text.loss(value)


def cells(report: SweepReport) -> tuple[list[str], list[list[str]]]:
    """Return the heads and a row for each trial: swept keys, state, the metric, other figures."""
    others = [
        name
        for name in ALWAYS
        if name != report.metric and any(getattr(t, name) is not None for t in report.trials)
    ]
    metrics = [HEADS[name] for name in (report.metric, *others)]
    heads = [*report.keys, "state", *metrics, "steps", "time"]
    rows = []
    for trial in report.trials:
        values = [written(trial.values.get(key)) for key in report.keys]
        state = BEST if trial.name == report.best else trial.status
        figures = [figure(report.metric, trial.metric)]
        figures += [figure(name, getattr(trial, name)) for name in others]
        rows.append([*values, state, *figures, _steps(trial), text.clock(trial.seconds)])
    return heads, rows


def _steps(trial: TrialReport) -> str:
    if trial.total_steps in (None, trial.steps):
        return f"{trial.steps:,}"
    return f"{trial.steps:,} of {trial.total_steps:,}"


def written(value: Any) -> str:
    """Return a swept value as YAML has it, shortened."""
    word = str(value) if isinstance(value, str | float) else text.as_yaml(value)
    return word if len(word) <= MAX_CELL else f"{word[: MAX_CELL - 3]}..."


def render(report: SweepReport) -> str:
    """Return the table, what went wrong below it, and where everything is."""
    heads, rows = cells(report)
    lines = [columns([heads, *rows], num_left=len(report.keys) + 1)]
    for trial in report.trials:
        if trial.error:
            lines.append(f"\n{trial.name} {trial.status}:")
            lines += [f"  {line}" for line in trial.error.splitlines()]
    lines.append("")
    if report.best is not None:
        best = report.trial(report.best)
        value = f"{HEADS[report.metric]} {figure(report.metric, best.metric)}"
        lines.append(f"  best      {report.best}: {value}")
        lines.append(f"  its job   {report.best_job}")
    lines.append(f"  report    {report.output_dir}/sweep.html")
    lines.append(f"  figures   {report.output_dir}/sweep.json")
    return "\n".join(lines)
