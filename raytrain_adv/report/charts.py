"""The plots of a report, from the rows of metrics.jsonl."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from raytrain_adv.report.plot import Level, Mark, Plot, Series, Xy
from raytrain_adv.report.record import RunReport

Row = Mapping[str, Any]
MIN_POINTS_TO_SMOOTH = 40


def plots(report: RunReport, rows: Sequence[Row]) -> list[Plot]:
    """Return every plot of the report; those without points are not drawn."""
    train = [row for row in rows if row["kind"] == "train"]
    evals = [row for row in rows if row["kind"] == "eval"]
    marks = _marks(rows)
    return [
        _loss(train, evals, marks),
        *_against(report),
        *_single(train, marks),
        _times(train, marks),
        _memory(train, marks, report),
    ]


def _loss(train: list[Row], evals: list[Row], marks: tuple[Mark, ...]) -> Plot:
    points = _points(train, "loss")
    curves = [Series("train", points, 1)]
    if len(points) >= MIN_POINTS_TO_SMOOTH:
        curves = [
            Series("each row", points, 1, "faint"),
            Series("train, smoothed", smoothed(points), 1),
        ]
    how = next((f", {row['how']}" for row in evals if row.get("how")), "")
    curves.append(Series(f"eval{how}", _points(evals, "loss"), 2, "dots"))
    return Plot(
        "Loss",
        "per label token",
        tuple(curves),
        (*marks, *_not_finite(train, "loss"), *_not_finite(evals, "loss")),
        span="wide",
    )


def _against(report: RunReport) -> list[Plot]:
    """Return this run's curves with those of the run named by compare_with."""
    other = report.baseline
    if other is None:
        return []
    pairs = [
        ("Training loss", report.train_loss, other.train_loss),
        ("Eval loss", report.eval_loss, other.eval_loss),
    ]
    return [
        Plot(
            f"{title}, compared with {other.output_dir}",
            "per label token",
            (
                Series("this run", smoothed(_finite(mine)), 1),
                Series("the other", smoothed(_finite(theirs)), 2),
            ),
            span="half",
        )
        for title, mine, theirs in pairs
    ]


def _finite(points: Sequence[tuple[int, float | None]]) -> list[Xy]:
    return [(step, value) for step, value in points if value is not None]


def _single(train: list[Row], marks: tuple[Mark, ...]) -> list[Plot]:
    """Return the plots that show one measure each."""
    rate = _points(train, "tokens_per_second_per_worker")
    norm = _points(train, "grad_norm")
    learning_rate = _points(train, "learning_rate")
    return [
        Plot("Learning rate", "", (Series("learning rate", learning_rate, 1),), marks, span="half"),
        Plot(
            "Gradient norm",
            "before clipping",
            (Series("gradient norm", norm, 1),),
            (*marks, *_not_finite(train, "grad_norm")),
            span="half",
        ),
        Plot("Speed", "tokens/s per worker", (Series("tokens/s", rate, 1),), marks, from_zero=True),
    ]


def _times(train: list[Row], marks: tuple[Mark, ...]) -> Plot:
    waits: list[Xy] = []
    previous = 0
    for row in train:
        waited = row.get("data_wait_s")
        if waited is not None:
            # The wait is the sum over the steps since the row before.
            waits.append((row["step"], waited / max(row["step"] - previous, 1)))
        previous = row["step"]
    series = (Series("step", _points(train, "step_s"), 1), Series("data wait", waits, 2))
    return Plot("Time per step", "s", series, marks, from_zero=True)


def _memory(train: list[Row], marks: tuple[Mark, ...], report: RunReport) -> Plot:
    levels: tuple[Level, ...] = ()
    on_cpu = (report.device or "").startswith("CPU")  # where a process's memory is measured
    if report.predicted_memory_gib is not None and not on_cpu:
        levels = (
            Level(report.predicted_memory_gib, f"predicted {report.predicted_memory_gib:.1f}"),
        )
    series = (Series("peak so far", _points(train, "peak_memory_gib"), 1),)
    return Plot("Peak memory", "GiB, rank 0", series, marks, levels, from_zero=True)


def smoothed(points: Sequence[Xy]) -> list[Xy]:
    """Return the mean over a thirtieth of the points around each; over fewer at both ends."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    sums = [0.0, *itertools.accumulate(y for _, y in finite)]
    half = max(len(finite) // 60, 1)
    result: list[Xy] = []
    for i, (x, _) in enumerate(finite):
        # As many on either side, so that a falling curve is not shifted.
        reach = min(half, i, len(finite) - 1 - i)
        result.append((x, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return result


def _points(rows: list[Row], key: str) -> list[Xy]:
    return [(row["step"], float(row[key])) for row in rows if row.get(key) is not None]


def _marks(rows: Sequence[Row]) -> tuple[Mark, ...]:
    steps = {row["step"] for row in rows if row.get("event") == "resume" and row.get("step")}
    return tuple(Mark(step, "resumed") for step in sorted(steps))


def _not_finite(rows: list[Row], key: str) -> tuple[Mark, ...]:
    """Mark the first NaN or infinity; nothing after it matters."""
    for row in rows:
        if key in row.get("non_finite", {}):
            return (Mark(row["step"], f"{key} is {row['non_finite'][key]}", alarming=True),)
    return ()
