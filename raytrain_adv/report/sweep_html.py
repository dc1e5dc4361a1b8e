"""sweep.html: the trials of a sweep compared, in one file for people that opens from disk."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from raytrain_adv import __version__
from raytrain_adv import text as numbers
from raytrain_adv.config.sweep import NEVER, SWITCH
from raytrain_adv.report.page import page, text
from raytrain_adv.report.parts import bars, card, folded, section
from raytrain_adv.report.plot import Level, Plot, Series, Xy, plot_html
from raytrain_adv.report.record import write_text
from raytrain_adv.report.sweep_record import SweepReport, TrialReport
from raytrain_adv.report.sweep_table import HEADS, cells, figure, written

FILE_NAME = "sweep.html"


def write_html(report: SweepReport, output_dir: str | Path) -> Path:
    """Write sweep.html beside sweep.json, and return its path.

    Raises:
        StorageError: when the file cannot be written.
    """
    return write_text(render(report), Path(output_dir) / FILE_NAME)


def render(report: SweepReport) -> str:
    """Return the document."""
    plots = "".join(_plot(report, key) for key in report.keys)
    body = "".join(
        [
            _header(report),
            _error(report),
            f'<dl class="figures">{"".join(_figures(report))}</dl>',
            section(
                f"{HEADS[report.metric].capitalize()} against each swept key",
                f'<div class="plots">{plots}</div>' if plots else "",
            ),
            section("Trials", _table(report)),
            section("Trials that did not get to their end", _troubles(report)),
            section("The best job", _best_job(report)),
            section("The sweep", _about(report)),
            f"<footer>raytrain_adv {__version__}, written "
            f"{time.strftime('%Y-%m-%d %H:%M %Z')}. The same figures for programs are in "
            "sweep.json; each trial's folder has its own report.html.</footer>",
        ]
    )
    return page(f"{report.name or 'sweep'}: {report.status}", body)


def _header(report: SweepReport) -> str:
    parts = [
        f"sweep over {', '.join(report.keys)}",
        numbers.plural(len(report.trials), "trial"),
        report.job_file,
    ]
    shown = "".join(f"<span>{text(part)}</span>" for part in parts if part)
    return (
        f'<header><div class="title"><h1>{text(report.name or "Sweep")}</h1>'
        f'<span class="status {report.status}">{report.status}</span></div>'
        f'<div class="sub">{shown}</div></header>'
    )


def _error(report: SweepReport) -> str:
    if report.status == "running":
        return card("<p>This sweep has not ended: it is going on, or its driver was killed.</p>")
    if report.error is None:
        return ""
    what, _, more = report.error.partition("\n")
    lines = f"<pre>{text(more)}</pre>" if more else ""
    return f'<section class="card error"><h2>{text(what)}</h2>{lines}</section>'


def _figures(report: SweepReport) -> list[str]:
    found = []
    if report.best is not None:
        best = report.trial(report.best)
        value = figure(report.metric, best.metric)
        found.append(_figure(f"Best {HEADS[report.metric]}", value, report.best))
    states = [t.status for t in report.trials]
    others = [
        f"{states.count(s)} {s}" for s in ("stopped", "failed", "running", "waiting") if s in states
    ]
    found.append(_figure("Done", f"{states.count('done')} of {len(states)}", ", ".join(others)))
    if report.started_at is not None and report.finished_at is not None:
        passed = numbers.clock(report.finished_at - report.started_at)
        at_once = report.max_concurrent_trials
        found.append(_figure("Time", passed, f"{at_once} at a time" if at_once else ""))
    return found


def _figure(label: str, value: str, more: str) -> str:
    below = f'<div class="more">{text(more)}</div>' if more else ""
    return f'<div class="card"><dt>{text(label)}</dt><dd>{text(value)}{below}</dd></div>'


def _plot(report: SweepReport, key: str) -> str:
    """Return the metric over a key's numbers; of a key without numbers, the best of each value."""
    measured = [t for t in report.trials if t.metric is not None]
    points = [(_number(t, key), t.metric) for t in measured]
    numeric = sorted((x, y) for x, y in points if x is not None and y is not None)
    others = [t for t in measured if _number(t, key) is None]
    if len({x for x, _ in numeric}) < 2:
        return _bars(report, key, measured)
    series = [Series("each trial", numeric, 1, "points")]
    best = _best_of_each(numeric, report.mode)
    if len(best) < len(numeric):
        series.append(Series("best of each value", best, 2, "line"))
    else:
        series = [Series("trial", numeric, 1, "dots")]
    return plot_html(
        Plot(
            f"{HEADS[report.metric].capitalize()} over {key}",
            "lower is better" if report.mode == "min" else "higher is better",
            tuple(series),
            levels=_levels(report, key, others),
            span="wide",
            over=key,
        )
    )


def _levels(report: SweepReport, key: str, others: Sequence[TrialReport]) -> tuple[Level, ...]:
    """Return a horizontal line for each value of the key that is no number: its best trial's."""
    found: dict[str, list[float]] = {}
    for trial in others:
        label = written(trial.values.get(key))
        label = "PTQ (never)" if key == SWITCH and label == NEVER else f"{key}: {label}"
        found.setdefault(label, []).append(trial.metric or 0.0)
    pick = min if report.mode == "min" else max
    return tuple(
        Level(pick(values), f"{label}  {figure(report.metric, pick(values))}")
        for label, values in found.items()
    )


def _bars(report: SweepReport, key: str, measured: Sequence[TrialReport]) -> str:
    best: dict[str, float] = {}
    pick = min if report.mode == "min" else max
    for trial in measured:
        label, value = written(trial.values.get(key)), trial.metric or 0.0
        best[label] = pick(best.get(label, value), value)
    if not best or any(value < 0 for value in best.values()):
        return ""
    rows = [(label, value, figure(report.metric, value)) for label, value in best.items()]
    return (
        f'<figure class="plot wide"><figcaption><b>{text(HEADS[report.metric].capitalize())} by '
        f"{text(key)}</b><span class=unit>the best of each value</span></figcaption>"
        f"{bars(rows, set())}</figure>"
    )


def _number(trial: TrialReport, key: str) -> float | None:
    """Return a trial's value of a key as a number; no delay is one of 0."""
    value: Any = trial.values.get(key)
    if key == SWITCH and value is None:
        return 0.0
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else None


def _best_of_each(points: Sequence[tuple[float, float]], mode: str) -> list[Xy]:
    pick = min if mode == "min" else max
    return [
        (x, pick(y for other, y in points if other == x)) for x in sorted({x for x, _ in points})
    ]


def _table(report: SweepReport) -> str:
    heads, rows = cells(report)
    lines = [_line("th", report, heads)]
    lines += [
        _line("td", report, row, trial) for row, trial in zip(rows, report.trials, strict=True)
    ]
    table = f'<table class="short">{"".join(f"<tr>{line}</tr>" for line in lines)}</table>'
    return card(f'<div class="scroll">{table}</div>')


def _line(
    tag: str, report: SweepReport, row: Sequence[str], trial: TrialReport | None = None
) -> str:
    num_keys = len(report.keys)
    found = []
    for i, cell in enumerate(row):
        is_best = trial is not None and trial.name == report.best
        body = f"<b>{text(cell)}</b>" if is_best else text(cell)
        if i == num_keys and trial is not None and trial.status not in ("waiting", "running"):
            place = quote(f"trials/{trial.name}/report.html")
            body = f'<a href="{place}">{body}</a>'
        found.append(f"<{tag}{' class=num' if i > num_keys else ''}>{body}</{tag}>")
    return "".join(found)


def _troubles(report: SweepReport) -> str:
    return "".join(
        card(f"<h3>{text(t.name)}: {t.status}</h3><pre>{text(t.error)}</pre>")
        for t in report.trials
        if t.error
    )


def _best_job(report: SweepReport) -> str:
    if report.best is None or report.best_job is None:
        return ""
    best = report.trial(report.best)
    command = f"python -m raytrain_adv.launch {report.best_job}"
    model = f"<p>its model <code>{text(best.model_dir)}</code></p>" if best.model_dir else ""
    return card(
        f"<p><b>{text(report.best)}</b></p>"
        f"<p>its run <code>{text(best.output_dir)}</code></p>{model}"
        f"<p>run it again <code>{text(command)}</code></p>"
    )


def _about(report: SweepReport) -> str:
    lines = [("command", report.command), ("folder", report.output_dir)]
    lines.append(("scheduler", report.scheduler))
    shown = "".join(f"<p>{label} <code>{text(value)}</code></p>" for label, value in lines)
    notes = "".join(f'<p class="note">{text(note)}</p>' for note in report.notes)
    return card(shown + (folded("Notes", notes) if notes else ""))
