"""Small line plots as HTML with inline SVG: lines stretch with the page, text keeps its size."""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

WIDTH, HEIGHT = 1000.0, 400.0
MAX_POINTS = 400
Xy = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Points of one measure. Non-finite values are left out: a Mark says where they were."""

    name: str
    points: Sequence[Xy]
    color: int
    """Number of the color in the page's palette."""
    style: Literal["line", "faint", "dots", "points"] = "line"
    """dots are joined by a thin line, points are not."""


@dataclass(frozen=True)
class Mark:
    """A vertical line at a step."""

    step: float
    label: str
    alarming: bool = False


@dataclass(frozen=True)
class Level:
    """A horizontal line."""

    value: float
    label: str


@dataclass(frozen=True)
class Plot:
    """One plot over the steps of the run, or over another number."""

    title: str
    unit: str
    series: tuple[Series, ...]
    marks: tuple[Mark, ...] = ()
    levels: tuple[Level, ...] = ()
    from_zero: bool = False
    span: Literal["wide", "half", "third"] = "third"
    """Share of the page's width."""
    over: str = "step"
    """What lies on the horizontal axis. Steps begin at 0; of anything else, positive values that
    differ much are on a logarithmic axis."""


@dataclass(frozen=True)
class Scale:
    """Where values lie on an axis."""

    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Return the value's place, 0 at the axis' low end and 1 at its high end."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return (value - low) / (high - low)


def plot_html(plot: Plot) -> str:
    """Return the plot as a <figure>, or nothing when there is no point to draw."""
    series = [s for s in (_finite(s) for s in plot.series) if s.points]
    if not series:
        return ""
    steps = [x for s in series for x, _ in s.points] + [mark.step for mark in plot.marks]
    x_axis = _x_scale(plot, steps)
    y_axis = _y_scale(plot, [y for s in series for _, y in s.points])
    shapes = [_grid(x_axis, y_axis), *(_level(level, y_axis) for level in plot.levels)]
    shapes += [_mark(mark, x_axis) for mark in plot.marks if x_axis.low <= mark.step <= x_axis.high]
    shapes += [_curve(s, x_axis, y_axis) for s in series]
    data = json.dumps(
        {
            "x": [x_axis.low, x_axis.high],
            "over": plot.over,
            "log": x_axis.logarithmic,
            "series": [
                [s.name, s.color, [[_short(x), _short(y)] for x, y in thinned(s.points)]]
                for s in series
                if s.style != "faint"
            ],
        },
        separators=(",", ":"),
    )
    over = "optimizer steps" if plot.over == "step" else plot.over
    label = html.escape(f"{plot.title} over {over}")
    return (
        f'<figure class="plot {plot.span}">{_caption(plot, series)}'
        f'<div class="area" data-plot="{html.escape(data)}">'
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" preserveAspectRatio="none" role="img" '
        f'aria-label="{label}">{"".join(shapes)}</svg>'
        f"{_tick_labels(x_axis, y_axis)}{_line_labels(plot, x_axis, y_axis)}</div></figure>"
    )


def linear_scale(
    low: float, high: float, num_ticks: int, whole: bool = False, outside: bool = True
) -> Scale:
    """Return an axis with about num_ticks ticks at round values.

    Args:
        low: smallest value to show.
        high: largest value to show.
        num_ticks: ticks wanted, roughly.
        whole: ticks at whole numbers only.
        outside: the axis ends at ticks outside the values, instead of at the values.
    """
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin * (not whole), high + margin
    step = _round_step((high - low) / num_ticks)
    if whole:
        step = max(round(step), 1)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if outside:
        low, high = first * step, last * step
    ticks = [i * step for i in range(first, last + 1)]
    slack = (high - low) * 1e-9
    return Scale(low, high, tuple(t for t in ticks if low - slack <= t <= high + slack))


def log_scale(low: float, high: float) -> Scale:
    """Return a logarithmic axis for positive values, with ticks at 1, 2, 5 or powers of ten."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    every = max(1, (last - first) // 6)
    steps = [f * 10.0**e for e in range(first, last + 1, every) for f in factors]
    low, high = low * 0.9, high * 1.1
    return Scale(low, high, tuple(t for t in steps if low <= t <= high), logarithmic=True)


def thinned(points: Sequence[Xy], limit: int = MAX_POINTS) -> list[Xy]:
    """Return at most limit points that look the same: each stretch's lowest and highest."""
    if len(points) <= limit:
        return list(points)
    num_stretches = (limit - 2) // 2
    kept = {0, len(points) - 1}
    for i in range(num_stretches):
        stretch = range(i * len(points) // num_stretches, (i + 1) * len(points) // num_stretches)
        kept.add(min(stretch, key=lambda j: points[j][1]))
        kept.add(max(stretch, key=lambda j: points[j][1]))
    return [points[i] for i in sorted(kept)]


def tick_text(value: float, step: float) -> str:
    """Return a tick's number, with the places that tell it from its neighbors."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (10 if suffix == "k" else 1):
            return f"{value / size:.{_places(step / size)}f}{suffix}"
    return f"{value:,.{_places(step)}f}"


def _places(step: float) -> int:
    return next((n for n in range(7) if abs(step * 10**n - round(step * 10**n)) < 1e-6), 7)


def _round_step(rough: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(rough))
    return next(f * magnitude for f in (1, 2, 2.5, 5, 10) if f * magnitude >= rough * 0.999)


def _finite(series: Series) -> Series:
    points = tuple((x, y) for x, y in series.points if math.isfinite(x) and math.isfinite(y))
    return Series(series.name, points, series.color, series.style)


def _x_scale(plot: Plot, values: list[float]) -> Scale:
    low, high = min(values), max(values)
    if plot.over == "step":
        return linear_scale(0.0, high, 6, whole=True, outside=False)
    if low > 0 and high >= 20 * low:
        return log_scale(low, high)
    whole = all(float(value).is_integer() for value in values)
    return linear_scale(low, high, 6, whole=whole, outside=False)


def _y_scale(plot: Plot, values: list[float]) -> Scale:
    values = values + [level.value for level in plot.levels]
    low, high = min(values), max(values)
    if any(level.value == high for level in plot.levels):
        high += 0.08 * (high - low)  # room for the words above a line at the top
    middle = sorted(values)[len(values) // 2]
    # One spike would press everything else to the ground.
    if not plot.from_zero and low > 0 and high > 20 * middle:
        return log_scale(low, high)
    num_ticks = 6 if plot.span == "wide" else 4
    return linear_scale(min(low, 0.0) if plot.from_zero else low, high, num_ticks)


def _short(number: float) -> float:
    return float(f"{number:.6g}")


def _xy(x: float, y: float, x_axis: Scale, y_axis: Scale) -> str:
    return f"{WIDTH * x_axis.place(x):.1f} {HEIGHT * (1 - y_axis.place(y)):.1f}"


def _grid(x_axis: Scale, y_axis: Scale) -> str:
    lines = [f"M0 {HEIGHT * (1 - y_axis.place(t)):.1f}h{WIDTH:.0f}" for t in y_axis.ticks]
    lines += [f"M{WIDTH * x_axis.place(t):.1f} {HEIGHT:.0f}v6" for t in x_axis.ticks]
    return f'<path class="grid" d="{"".join(lines)}"/>'


def _level(level: Level, y_axis: Scale) -> str:
    return (
        f'<path class="level" d="M0 {HEIGHT * (1 - y_axis.place(level.value)):.1f}h{WIDTH:.0f}"/>'
    )


def _mark(mark: Mark, x_axis: Scale) -> str:
    kind = "mark alarm" if mark.alarming else "mark"
    return f'<path class="{kind}" d="M{WIDTH * x_axis.place(mark.step):.1f} 0v{HEIGHT:.0f}"/>'


def _curve(series: Series, x_axis: Scale, y_axis: Scale) -> str:
    places = [_xy(x, y, x_axis, y_axis) for x, y in thinned(series.points)]
    if series.style in ("dots", "points") or len(places) == 1:
        # A line without length has round ends: a dot that stays round when the plot is stretched.
        dots = "".join(f"M{place}h.01" for place in places)
        line = (
            ""
            if len(places) == 1 or series.style == "points"
            else f'<path class="thin c{series.color}" d="M{"L".join(places)}"/>'
        )
        return f'{line}<path class="dots c{series.color}" d="{dots}"/>'
    return f'<path class="{series.style} c{series.color}" d="M{"L".join(places)}"/>'


def _caption(plot: Plot, series: list[Series]) -> str:
    keys = ""
    if len(series) > 1:
        keys = "".join(
            f'<span class="key k{s.color}{" pale" if s.style == "faint" else ""}">'
            f"{html.escape(s.name)}</span>"
            for s in series
        )
    unit = f'<span class="unit">{html.escape(plot.unit)}</span>' if plot.unit else ""
    title = f"<b>{html.escape(plot.title)}</b>"
    return f'<figcaption>{title}{unit}<span class="keys">{keys}</span></figcaption>'


def _tick_labels(x_axis: Scale, y_axis: Scale) -> str:
    y_step = y_axis.ticks[1] - y_axis.ticks[0] if len(y_axis.ticks) > 1 else y_axis.high
    labels = [
        f'<span class="ty" style="bottom:{100 * y_axis.place(t):.2f}%">'
        f"{tick_text(t, t if y_axis.logarithmic else y_step)}</span>"
        for t in y_axis.ticks
    ]
    x_step = x_axis.ticks[1] - x_axis.ticks[0] if len(x_axis.ticks) > 1 else 1.0
    labels += [
        f'<span class="tx" style="left:{100 * x_axis.place(t):.2f}%">'
        f"{tick_text(t, t if x_axis.logarithmic else x_step)}</span>"
        for t in x_axis.ticks
    ]
    return "".join(labels)


def _line_labels(plot: Plot, x_axis: Scale, y_axis: Scale) -> str:
    labels = [
        f'<span class="on-level" style="bottom:{100 * y_axis.place(level.value):.2f}%">'
        f"{html.escape(level.label)}</span>"
        for level in plot.levels
    ]
    for mark in plot.marks:
        if x_axis.low <= mark.step <= x_axis.high:
            place = x_axis.place(mark.step)
            side = f"right:{100 * (1 - place):.2f}%" if place > 0.5 else f"left:{100 * place:.2f}%"
            kind = "on-mark alarm" if mark.alarming else "on-mark"
            labels.append(f'<span class="{kind}" style="{side}">{html.escape(mark.label)}</span>')
    return "".join(labels)
