"""sweep.html: the trials of a sweep compared, in one file for people that opens from disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raytrain_adv import text
from raytrain_adv.config.sweep import NEVER, SWITCH
from raytrain_adv.report.html import Figure, page
from raytrain_adv.report.plot import Level, Plot, Series, Xy, draw
from raytrain_adv.report.record import write_text
from raytrain_adv.report.sweep_record import SweepReport, TrialReport
from raytrain_adv.report.sweep_table import HEADS, cells, figure, written

FILE_NAME = "sweep.html"


def write_html(report: SweepReport, output_dir: str | Path) -> Path:
    """Write sweep.html next to sweep.json, and return its path.

    Raises:
        StorageError: when the file cannot be written.
    """
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
        metric=HEADS[report.metric].capitalize(),
        figures=_figures(report),
        drawings=draw([_plot(report, key, keys[key]) for key in keys if has_axis[key]]),
        bars={key: bars for key in keys if not has_axis[key] and (bars := _bars(report, key))},
        heads=heads,
        rows=list(zip(rows, report.trials, strict=True)),
        best=None if report.best is None else report.trial(report.best),
    )


def _figures(report: SweepReport) -> list[Figure]:
    found: list[Figure] = []
    if report.best is not None:
        value = figure(report.metric, report.trial(report.best).metric)
        found.append((f"Best {HEADS[report.metric]}", value, "", report.best))
    states = [t.status for t in report.trials]
    others = [
        f"{states.count(s)} {s}" for s in ("stopped", "failed", "running", "waiting") if s in states
    ]
    found.append(("Done", f"{states.count('done')} of {len(states)}", "", ", ".join(others)))
    if report.started_at is not None and report.finished_at is not None:
        at_once = report.max_concurrent_trials
        passed = text.clock(report.finished_at - report.started_at)
        found.append(("Time", passed, "", f"{at_once} at a time" if at_once else ""))
    return found


def _plot(report: SweepReport, key: str, points: list[Xy]) -> Plot:
    """Return the metric over a key's numbers; each other value of the key is a level."""
    pick = min if report.mode == "min" else max
    best = [
        (x, pick(y for other, y in points if other == x)) for x in sorted({x for x, _ in points})
    ]
    series = [Series("each trial", points, 1, "points"), Series("best of each value", best, 2)]
    if len(best) == len(points):
        series = [Series("trial", points, 1, "dots")]
    levels = _best_of_each(report, [t for t in _measured(report) if _number(t, key) is None], key)
    return Plot(
        f"{HEADS[report.metric].capitalize()} over {key}",
        "lower is better" if report.mode == "min" else "higher is better",
        tuple(series),
        levels=tuple(
            Level(value, f"{_level(key, label)}  {figure(report.metric, value)}")
            for label, value in levels.items()
        ),
        span="wide",
        over=key,
    )


def _level(key: str, label: str) -> str:
    return "PTQ (never)" if key == SWITCH and label == NEVER else f"{key}: {label}"


def _bars(report: SweepReport, key: str) -> list[tuple[str, float, str]]:
    """Return a bar for each value of a key without numbers; none if a metric is negative."""
    best = _best_of_each(report, _measured(report), key)
    if any(value < 0 for value in best.values()):
        return []
    return [(label, value, figure(report.metric, value)) for label, value in best.items()]


def _best_of_each(report: SweepReport, trials: Sequence[TrialReport], key: str) -> dict[str, float]:
    """Return the best metric of each value that these trials have for the key."""
    pick = min if report.mode == "min" else max
    best: dict[str, float] = {}
    for trial in trials:
        label, value = written(trial.values.get(key)), trial.metric or 0.0
        best[label] = pick(best.get(label, value), value)
    return best


def _measured(report: SweepReport) -> list[TrialReport]:
    return [t for t in report.trials if t.metric is not None]


def _points(report: SweepReport, key: str) -> list[Xy]:
    """Return (value of the key, metric) of each trial where the value is a number."""
    numbers = [(_number(trial, key), trial.metric) for trial in _measured(report)]
    return sorted((x, y) for x, y in numbers if x is not None and y is not None)


def _number(trial: TrialReport, key: str) -> float | None:
    """Return a trial's value of a key as a number; no delay is one of 0."""
    value: Any = trial.values.get(key)
    if key == SWITCH and value is None:
        return 0.0
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else None
