"""The trials of a sweep compared: sweep.html, one file that opens from disk, and a text table."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raytrain_adv import text
from raytrain_adv.config.sweep import CONVERTED_LOSS, NEVER, SWITCH
from raytrain_adv.report.compared import curves
from raytrain_adv.report.html import Figure, page
from raytrain_adv.report.plot import Level, Plot, Series, Xy, draw
from raytrain_adv.report.record import write_text
from raytrain_adv.report.summary import columns
from raytrain_adv.report.sweep_record import SweepReport, TrialReport
from raytrain_adv.storage import metrics_file

FILE_NAME = "sweep.html"
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
FORMS = {
    "tokens_per_second_per_worker": text.rate,
    "step_seconds": text.seconds,
    "peak_memory_gib": text.gib,
    "mfu_bf16": text.percent,
}
BEST = "best"
MAX_CELL = 40


def write_html(report: SweepReport, output_dir: str | Path) -> Path:
    """Write sweep.html next to sweep.json, and return its path. Raises StorageError."""
    return write_text(render(report), Path(output_dir) / FILE_NAME)


def render(report: SweepReport) -> str:
    """Return the document."""
    heads, rows = cells(report)
    keys = {key: _points(report, key) for key in report.keys}
    has_axis = {key: len({x for x, _ in points}) > 1 for key, points in keys.items()}
    return page(
        "sweep.html.j2",
        report=report,
        title=report.name or "Sweep",
        subtitle=[
            f"sweep over {', '.join(report.keys)}",
            text.plural(len(report.trials), "trial"),
            report.job_file,
        ],
        metric=_ranked_by(report).capitalize(),
        curves=draw(_curves(report)),
        figures=_figures(report),
        drawings=draw([_plot(report, key, keys[key]) for key in keys if has_axis[key]]),
        bars={key: bars for key in keys if not has_axis[key] and (bars := _bars(report, key))},
        heads=heads,
        rows=list(zip(rows, report.trials, strict=True)),
        best=None if report.best is None else report.trial(report.best),
    )


def _curves(report: SweepReport) -> list[Plot]:
    """Return the losses of every trial that has begun, from its own folder."""
    rows = []
    for trial in (t for t in report.trials if t.status != "waiting"):
        with contextlib.suppress(OSError, ValueError):  # no path of this machine, or not readable
            path = Path(trial.output_dir) / metrics_file.FILE_NAME
            rows.append((trial.name, metrics_file.read(path)))
    return [plot for plot in curves(rows) if "loss" in plot.title] if rows else []


def _figures(report: SweepReport) -> list[Figure]:
    found: list[Figure] = []
    if report.best is not None:
        value = figure(report.metric, report.trial(report.best).metric)
        found.append((f"Best {_ranked_by(report)}", value, "", report.best))
    states = [t.status for t in report.trials]
    others = [s for s in ("stopped", "failed", "running", "waiting") if s in states]
    more = ", ".join(f"{states.count(s)} {s}" for s in others)
    found.append(("Done", f"{states.count('done')} of {len(states)}", "", more))
    if report.started_at is not None and report.finished_at is not None:
        at_once = report.max_concurrent_trials
        passed = text.clock(report.finished_at - report.started_at)
        found.append(("Time", passed, "", f"{at_once} at a time" if at_once else ""))
    return found


def _plot(report: SweepReport, key: str, points: list[Xy]) -> Plot:
    """Return the metric over a key's numbers; each other value of the key is a level."""
    pick = min if report.mode == "min" else max
    xs = sorted({x for x, _ in points})
    best = [(x, pick(y for other, y in points if other == x)) for x in xs]
    series = [Series("each trial", points, 1, "points"), Series("best of each value", best, 2)]
    if len(best) == len(points):
        series = [Series("trial", points, 1, "dots")]
    levels = []
    others = [t for t in _measured(report) if _number(t, key) is None]
    for value, metric in _best_of_each(report, others, key).items():
        label = "PTQ (never)" if key == SWITCH and value == NEVER else f"{key}: {value}"
        levels.append(Level(metric, f"{label}  {figure(report.metric, metric)}"))
    title = f"{_ranked_by(report).capitalize()} over {key}"
    better = "lower is better" if report.mode == "min" else "higher is better"
    return Plot(title, better, tuple(series), levels=tuple(levels), span="wide", over=key)


def _bars(report: SweepReport, key: str) -> list[tuple[str, float, str]]:
    """Return a bar for each value of a key without numbers; none if a metric is negative."""
    best = _best_of_each(report, _measured(report), key)
    if any(value < 0 for value in best.values()):
        return []
    return [(label, value, figure(report.metric, value)) for label, value in best.items()]


def _best_of_each(report: SweepReport, trials: Sequence[TrialReport], key: str) -> dict[str, float]:
    pick = min if report.mode == "min" else max
    best: dict[str, float] = {}
    for trial in trials:
        label, value = written(trial.values.get(key)), trial.metric or 0.0
        best[label] = pick(best.get(label, value), value)
    return best


def _measured(report: SweepReport) -> list[TrialReport]:
    return [t for t in report.trials if t.metric is not None]


def _points(report: SweepReport, key: str) -> list[Xy]:
    numbers = [(_number(trial, key), trial.metric) for trial in _measured(report)]
    return sorted((x, y) for x, y in numbers if x is not None and y is not None)


def _number(trial: TrialReport, key: str) -> float | None:
    """Return a trial's value of a key as a number; no delay is one of 0."""
    value: Any = trial.values.get(key)
    if key == SWITCH and value is None:
        return 0.0
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else None


def figure(metric: str, value: float | None) -> str:
    """Return a metric's value as people read it."""
    return FORMS.get(metric, text.loss)(value)


def _has_other_last(report: SweepReport) -> bool:
    """Whether a trial exports another model than its last, and has a loss of each."""
    done = [t for t in report.trials if t.metric is not None]
    return any(getattr(t, report.metric) not in (None, t.metric) for t in done)


def _ranked_by(report: SweepReport) -> str:
    return HEADS[report.metric] + (" as exported" if _has_other_last(report) else "")


def cells(report: SweepReport) -> tuple[list[str], list[list[str]]]:
    """Return the heads and a row for each trial: swept keys, state, the metric, other figures."""
    known = [name for name in ALWAYS if any(getattr(t, name) is not None for t in report.trials)]
    others = [name for name in known if name != report.metric or _has_other_last(report)]
    metrics = [_ranked_by(report), *(HEADS[name] for name in others)]
    heads = [*report.keys, "state", *metrics, "steps", "time"]
    rows = []
    for trial in report.trials:
        values = [written(trial.values.get(key)) for key in report.keys]
        state = BEST if trial.name == report.best else trial.status
        figures = [figure(report.metric, trial.metric)]
        figures += [figure(name, getattr(trial, name)) for name in others]
        of_total = "" if trial.total_steps in (None, trial.steps) else f" of {trial.total_steps:,}"
        steps = f"{trial.steps:,}{of_total}"
        rows.append([*values, state, *figures, steps, text.clock(trial.seconds)])
    return heads, rows


def written(value: Any) -> str:
    """Return a swept value as YAML has it, shortened."""
    word = str(value) if isinstance(value, str | float) else text.as_yaml(value)
    return word if len(word) <= MAX_CELL else f"{word[: MAX_CELL - 3]}..."


def render_text(report: SweepReport) -> str:
    """Return the table, what went wrong below it, and where everything is."""
    heads, rows = cells(report)
    lines = [columns([heads, *rows], num_left=len(report.keys) + 1)]
    for trial in report.trials:
        if trial.error:
            lines.append(f"\n{trial.name} {trial.status}:")
            lines += [f"  {line}" for line in trial.error.splitlines()]
    lines.append("")
    if report.best is not None:
        value = f"{_ranked_by(report)} {figure(report.metric, report.trial(report.best).metric)}"
        lines += [f"  best      {report.best}: {value}", f"  its job   {report.best_job}"]
    folder = report.output_dir
    lines += [f"  report    {folder}/sweep.html", f"  figures   {folder}/sweep.json"]
    return "\n".join(lines)
