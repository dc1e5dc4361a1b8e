"""Tables and sections by rich: at one width, and without color where there is no terminal."""

import io
from collections.abc import Iterable, Iterator
from typing import Literal

from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from raytrain_adv.text import clean

WIDTH = 100


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
        table.add_column(name, justify=side, no_wrap=name in no_wrap, overflow="fold")
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
