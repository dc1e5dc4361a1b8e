"""The plots of a report, from the rows of metrics.jsonl."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from raytrain_adv.report.plot import Level, Mark, Plot, Series, Xy
from raytrain_adv.report.record import RunReport

Row = Mapping[str, Any]
MIN_POINTS_TO_SMOOTH = 40


def plots(report: RunReport, rows: Sequence[Row]) -> list[Plot]:
    """Return every plot of the report; those without points are not drawn."""
    train = [row for row in rows if row["kind"] == "train"]
    evals = [row for row in rows if row["kind"] == "eval"]
    resumed = {row["step"] for row in rows if row.get("event") == "resume" and row.get("step")}
    marks = tuple(Mark(step, "resumed") for step in sorted(resumed))

    def single(title: str, unit: str, key: str, label: str, **more: Any) -> Plot:
        series = (Series(label, _points(train, key), 1),)
        return Plot(title, unit, series, **{"marks": marks, **more})

    norm = ("Gradient norm", "before clipping", "grad_norm", "gradient norm")
    norm_marks = (*marks, *_not_finite(train, "grad_norm"))
    speed = ("Speed", "tokens/s per worker", "tokens_per_second_per_worker", "tokens/s")
    memory = ("Peak memory", "GiB, rank 0", "peak_memory_gib", "peak so far")
    node = (
        Series("CPU", _points(train, "cpu_percent"), 1),
        Series("host memory", _points(train, "host_memory_percent"), 2),
        Series("GPU of rank 0", _points(train, "gpu_percent"), 3),
    )
    answers = (Series("held-out answers", _points(evals, "exact_answers"), 2, "dots"),)
    exact = Plot("Exact answers", "share", answers, marks, span="wide", from_zero=True)
    watts = ("GPU power", "W, rank 0", "gpu_watts", "power")
    celsius = ("GPU temperature", "°C, rank 0", "gpu_celsius", "temperature")
    times = (Series("step", _points(train, "step_s"), 1), Series("data wait", _waits(train), 2))
    return [
        _loss(train, evals, marks),
        exact,
        *_against(report),
        single("Learning rate", "", "learning_rate", "learning rate"),
        single(*norm, marks=norm_marks),
        single(*speed, from_zero=True),
        Plot("Time per step", "s", times, marks, from_zero=True),
        single(*memory, levels=_predicted(report), from_zero=True),
        Plot("The node of rank 0", "% in use", node, marks, from_zero=True),
        single(*watts, from_zero=True),
        single(*celsius),
    ]


def _loss(train: list[Row], evals: list[Row], marks: tuple[Mark, ...]) -> Plot:
    points = _points(train, "loss")
    curves = [Series("train", points, 1)]
    if len(points) >= MIN_POINTS_TO_SMOOTH:
        smooth = Series("train, smoothed", smoothed(points), 1)
        curves = [Series("each row", points, 1, "faint"), smooth]
    how = next((f", {row['how']}" for row in evals if row.get("how")), "")
    curves.append(Series(f"eval{how}", _points(evals, "loss"), 2, "dots"))
    marks = (*marks, *_not_finite(train, "loss"), *_not_finite(evals, "loss"))
    return Plot("Loss", "per label token", tuple(curves), marks, span="wide")


def _against(report: RunReport) -> list[Plot]:
    other = report.baseline
    if other is None:
        return []
    found = []
    for title, mine, theirs in (
        ("Training loss", _drawn(report.train_loss), _drawn(other.train_loss)),
        ("Eval loss", _finite(report.eval_loss), _finite(other.eval_loss)),
    ):
        style: Literal["line", "dots"] = "dots" if title == "Eval loss" else "line"
        series = (Series("this run", mine, 1, style), Series("the other", theirs, 2, style))
        title = f"{title}, compared with {other.output_dir}"
        found.append(Plot(title, "per label token", series))
    return found


def _finite(points: Sequence[tuple[int, float | None]]) -> list[Xy]:
    return [(step, value) for step, value in points if value is not None]


def _drawn(points: Sequence[tuple[int, float | None]]) -> list[Xy]:
    known = _finite(points)
    return smoothed(known) if len(known) >= MIN_POINTS_TO_SMOOTH else known


def _waits(train: list[Row]) -> list[Xy]:
    """Return the wait per step: a row's is the sum over the steps since the row before."""
    steps = [0, *(row["step"] for row in train)]
    return [
        (row["step"], row["data_wait_s"] / max(row["step"] - before, 1))
        for row, before in zip(train, steps, strict=False)
        if row.get("data_wait_s") is not None
    ]


def _predicted(report: RunReport) -> tuple[Level, ...]:
    """Return the predicted peak, except on a CPU, where a process's memory is measured."""
    gib = report.predicted_memory_gib
    if gib is None or (report.device or "").startswith("CPU"):
        return ()
    return (Level(gib, f"predicted {gib:.1f}"),)


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


def _not_finite(rows: list[Row], key: str) -> tuple[Mark, ...]:
    """Mark the first NaN or infinity; nothing after it matters."""
    for row in rows:
        if key in row.get("non_finite", {}):
            return (Mark(row["step"], f"{key} is {row['non_finite'][key]}", alarming=True),)
    return ()
