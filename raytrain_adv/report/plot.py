"""Line plots as SVG drawn by matplotlib: colors from the page, words in the page's HTML."""

from __future__ import annotations

import io
import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 400
SPIKE = 20.0
"""Values above this multiple of the median, or steps of a key over this range, need a log axis."""
ROUND = (1, 2, 2.5, 5, 10)
SIZES = {"wide": (960, 260), "half": (470, 190), "phone": (330, 190)}
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 16, 26  # margins of a drawing around its axes, in pixels
CURVES: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 1.6},
    "faint": {"linewidth": 0.9, "alpha": 0.32},
    "dots": {"linewidth": 0.9, "marker": "o", "markersize": 6},
    "points": {"linewidth": 0, "marker": "o", "markersize": 6},
}
# Matplotlib writes colors as hex; each of these becomes a variable of the page, light or dark.
NUM_COLORS = 8
INKS = {
    "grid": "#010101",
    "dim": "#020202",
    "bad": "#050505",
    **{f"c{number}": f"#0{number}0a0b" for number in range(1, NUM_COLORS + 1)},
}
STYLE = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 11,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top")},
    "axes.edgecolor": INKS["grid"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.autolimit_mode": "round_numbers",
    **{f"axes.{axis}margin": 0.0 for axis in "xy"},
    "axes.formatter.limits": (-4, 6),
    "axes.formatter.useoffset": False,
    "grid.color": INKS["grid"],
    **{f"lines.solid_{end}style": "round" for end in ("cap", "join")},
    "text.color": INKS["dim"],
    **{f"{axis}tick.major.pad": 8 for axis in "xy"},
    **{f"{axis}tick.labelcolor": INKS["dim"] for axis in "xy"},
    **{f"{axis}tick.{kind}.size": 0 for axis in "xy" for kind in ("major", "minor")},
}
Xy = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Points of one measure. Non-finite values are not drawn: a Mark shows where they were."""

    name: str
    points: Sequence[Xy]
    color: int  # number of the color in the page's palette, from 1
    style: Literal["line", "faint", "dots", "points"] = "line"  # dots are joined by a thin line


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
    span: Literal["wide", "half"] = "half"  # share of the page's width
    over: str = "step"
    """The horizontal axis. Steps begin at 0; of anything else, positive values that differ much get
    a logarithmic axis."""


@dataclass(frozen=True)
class Drawing:
    """A plot that is drawn, as the template shows it."""

    plot: Plot
    keys: list[tuple[str, str]]  # CSS class and label of each line, in the order of the legend
    shapes: list[tuple[str, Markup, dict[str, float]]]
    """Where it is shown (any, page, phone), its SVG, and the axes' left and right end in it."""
    data: str  # JSON for the page's script: the points under the pointer


def draw(plots: Sequence[Plot]) -> list[Drawing]:
    """Return the drawings of those plots that have a point."""
    return [_draw(plot, series) for plot in plots if (series := _drawable(plot))]


def thinned(points: Sequence[Xy], limit: int = MAX_POINTS) -> list[Xy]:
    """Return at most limit points that look the same: each stretch's lowest and highest."""
    if len(points) <= limit:
        return list(points)
    num_stretches = (limit - 2) // 2
    ends = [i * len(points) // num_stretches for i in range(num_stretches + 1)]
    kept = {0, len(points) - 1}
    for start, end in pairwise(ends):
        kept |= {pick(range(start, end), key=lambda i: points[i][1]) for pick in (min, max)}
    return [points[i] for i in sorted(kept)]


def _drawable(plot: Plot) -> list[Series]:
    found = []
    for one in plot.series:
        points = [(x, y) for x, y in one.points if math.isfinite(x) and math.isfinite(y)]
        if points:
            found.append(replace(one, points=thinned(points)))
    return found


def _draw(plot: Plot, series: list[Series]) -> Drawing:
    sizes = {"page": plot.span, "phone": "phone"}
    keys = [(f"k{s.color} {s.style}", s.name) for s in series] if len(series) > 1 else []
    keys += [("level", level.label) for level in plot.levels]
    marks = dict.fromkeys(("alarm" if m.alarming else "mark", m.label) for m in plot.marks)
    shapes = [(shown, *_svg(plot, series, *SIZES[size])) for shown, size in sizes.items()]
    low, high, is_log = _x_range(plot, series)
    points = [
        [s.name, s.color, [[float(f"{x:.6g}"), float(f"{y:.6g}")] for x, y in s.points]]
        for s in series
        if s.style != "faint"
    ]
    logs = {"log": is_log, "ylog": _has_spike(plot, series)}
    data = {"x": [low, high], "over": plot.over, **logs, "series": points}
    return Drawing(plot, [*keys, *marks], shapes, json.dumps(data, separators=(",", ":")))


def _x_range(plot: Plot, series: list[Series]) -> tuple[float, float, bool]:
    """Return the ends of the horizontal axis, and whether it is logarithmic."""
    values = [x for s in series for x, _ in s.points] + [mark.step for mark in plot.marks]
    low, high = min(values), max(values)
    if plot.over == "step":
        return 0.0, max(high, 1.0), False
    if low > 0 and high >= SPIKE * low:
        return low * 0.9, high * 1.1, True
    margin = (high - low) * 0.02 or abs(low) * 0.1 or 1.0
    return low - margin, high + margin, False


def _has_spike(plot: Plot, series: list[Series]) -> bool:
    """Return whether a linear axis would press everything but a spike to the ground."""
    values = sorted([y for s in series for _, y in s.points] + [v.value for v in plot.levels])
    is_spike = values[0] > 0 and values[-1] > SPIKE * values[len(values) // 2]
    return is_spike and not plot.from_zero


def _svg(
    plot: Plot, series: list[Series], width: int, height: int
) -> tuple[Markup, dict[str, float]]:
    """Return the plot as SVG of this size in pixels, and where its axes begin and end."""
    # A first import lists the machine's fonts, and reports that as a warning.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib import style
    from matplotlib.figure import Figure

    left, right, bottom, top = LEFT / width, 1 - RIGHT / width, BOTTOM / height, 1 - TOP / height
    over = f" over {'optimizer steps' if plot.over == 'step' else plot.over}"
    label = plot.title.removesuffix(over) + over
    salt = {"svg.hashsalt": f"{label} {width}"}  # ids differ between drawings, not between runs
    with style.context({**STYLE, **salt}, after_reset=True), io.StringIO() as file:
        figure = Figure(figsize=(width / 72, height / 72))  # matplotlib's SVG has 72 to the inch
        axes = figure.add_axes((left, bottom, right - left, top - bottom))
        _curves(axes, series)
        _scale(axes, plot, series, narrow=width < SIZES["half"][0])
        _lines(axes, plot)
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
        return _inline(file.getvalue(), label), {"left": round(left, 4), "right": round(right, 4)}


def _curves(axes: Axes, series: list[Series]) -> None:
    for one in series:
        style = CURVES["dots" if len(one.points) == 1 else one.style]
        style = {**style, "color": INKS[f"c{one.color}"], "markeredgewidth": 0}
        axes.plot(*zip(*one.points, strict=True), clip_on=False, **style)


def _lines(axes: Axes, plot: Plot) -> None:
    style: dict[str, Any] = {"linewidth": 1.2, "clip_on": False}
    for level in plot.levels:
        axes.axhline(level.value, color=INKS["c2"], dashes=(5, 4), **style)
    for mark in plot.marks:
        color = INKS["bad" if mark.alarming else "dim"]
        axes.axvline(mark.step, color=color, dashes=(2, 3), **style)


def _scale(axes: Axes, plot: Plot, series: list[Series], narrow: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    low, high, is_log = _x_range(plot, series)
    has_spike = _has_spike(plot, series)
    axes.set(xscale="log" if is_log else "linear", yscale="log" if has_spike else "linear")
    places = sorted({x for s in series for x, _ in s.points})
    x_ticks = (axes.xaxis, is_log, plot.over == "step", 4 if narrow else 8)
    for axis, log, whole, num_ticks in (x_ticks, (axes.yaxis, has_spike, False, 4)):
        if log:
            axis.set_minor_formatter("")
        else:
            axis.set_major_locator(MaxNLocator(num_ticks, steps=ROUND, integer=whole))
        if log or whole:
            axis.set_major_formatter("{x:,.7g}")
    if plot.over != "step" and len(places) <= (4 if narrow else 8):
        axes.set_xticks(places, [f"{x:,.7g}" for x in places])  # the values that were tried
    for line in axes.get_ygridlines():
        line.set_clip_on(False)
    axes.set_xlim(low, high)
    axes.update_datalim([(low, level.value) for level in plot.levels])
    axes.update_datalim([(low, 0.0)] if plot.from_zero else [])
    axes.autoscale_view(scalex=False)
    if plot.from_zero and axes.dataLim.ymin >= 0.0:
        axes.set_ylim(bottom=0.0)  # values that are all 0 would lie between -0.05 and 0.05


def _inline(document: str, label: str) -> Markup:
    """Return matplotlib's SVG as an element of the page, without header, styles and group names."""
    size = re.search(r'viewBox="[^"]*"', document)
    svg = document[document.index("<g ") : document.rindex("</svg>")]
    for part in (r' id="[a-z]+_\d+"', r' transform="rotate\(-0 [^"]*"', r" font-family: [^;]*;"):
        svg = re.sub(part, "", svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    for name, color in INKS.items():
        svg = svg.replace(color, f"var(--{name})")
    element = Markup('<svg {} role="img" aria-label="{}">{}</svg>')
    return element.format(Markup(size[0] if size else ""), label, Markup(svg))
