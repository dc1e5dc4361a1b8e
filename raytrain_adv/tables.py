"""Tables and sections by rich: at one width, and without color where there is no terminal."""

import io
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import rich.text
from rich.console import Console, ConsoleOptions, RenderableType
from rich.containers import Lines
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table

from raytrain_adv.text import clean

WIDTH = 100
PARTS = tuple(re.compile(rf"[^{mark}]*[{mark}]+|[^{mark}]+") for mark in ("./,", "_-"))
"""Parts of a name or path, each with what separates it from the next; of such a part too."""


class Text(rich.text.Text):
    """A text whose names and paths, where they are longer than a line, continue after a dot, slash
    or comma, or, where that is not enough, after an underscore or hyphen.
    """

    def wrap(self, console: Console, width: int, **how: Any) -> Lines:
        """Return its lines, each of at most `width` cells."""
        breaks: list[int] = []
        for word in re.finditer(r"\S+", self.plain):
            start = word.start()
            for first, end in _parts(self.plain, *word.span(), width, *PARTS):
                if end - start > width and first > start:
                    breaks.append(start := first)
        whole = rich.text.Text("\n").join(self.divide(breaks))
        return whole.wrap(console, width, **how)


def _parts(
    text: str, start: int, end: int, width: int, *kinds: re.Pattern[str]
) -> Iterator[tuple[int, int]]:
    if not kinds or end - start <= width:
        yield start, end
        return
    for part in kinds[0].finditer(text, start, end):
        yield from _parts(text, *part.span(), width, *kinds[1:])


class Fitting:
    """A view, or another one where the first is wider than a line."""

    def __init__(self, wide: RenderableType, narrow: RenderableType) -> None:
        self.wide, self.narrow = wide, narrow

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        unlimited = options.update(max_width=10 * WIDTH)
        fits = console.measure(self.wide, options=unlimited).maximum <= options.max_width
        yield self.wide if fits else self.narrow


class _Clean:
    """A view without the control characters that texts of other people's files may have."""

    def __init__(self, view: RenderableType) -> None:
        self.view = view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for part in console.render(self.view, options):
            yield part if part.control else Segment(clean(part.text), part.style)


def plain(view: RenderableType, width: int = WIDTH) -> str:
    """Return what rich would draw as plain text, without color and trailing spaces."""
    file = io.StringIO()
    Console(file=file, width=width, color_system=None, highlight=False).print(_Clean(view))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def show(view: RenderableType) -> None:
    """Print a view: in color on a terminal, else as plain text."""
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(_Clean(view), width=min(console.width, WIDTH))
    else:
        console.file.write(plain(view) + "\n")


def columns(*names: str, right: Iterable[str] = (), no_wrap: Iterable[str] = ()) -> Table:
    """Return a table without lines, whose cells wrap, except in columns of `no_wrap`."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in names:
        side: Literal["right", "left"] = "right" if name in right else "left"
        table.add_column(Text(name), justify=side, no_wrap=name in no_wrap, overflow="fold")
    return table


def pairs(rows: Iterable[tuple[str, str]]) -> Table:
    """Return names and their values in two columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def indented(view: RenderableType, by: int = 2, above: int = 0) -> Padding:
    """Return a view moved to the right, with empty lines above it."""
    return Padding(view, (above, 0, 0, by))


def section(title: str, *content: RenderableType) -> list[RenderableType]:
    """Return an empty line, a title, and the content indented below it."""
    return [Text(), Text(title, style="bold cyan"), *map(indented, content)]
