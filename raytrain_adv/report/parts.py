"""Pieces of report.html that sections share. What is not called body is plain text."""

from collections.abc import Sequence

from raytrain_adv.report.page import text


def section(title: str, body: str) -> str:
    """Return a titled section, or nothing where there is nothing in it."""
    return f"<section><h2>{text(title)}</h2>{body}</section>" if body else ""


def card(body: str) -> str:
    """Return the framed body."""
    return f'<div class="card">{body}</div>'


def below(body: str) -> str:
    """Return a body with room above it, or nothing where there is none."""
    return f'<div class="after">{body}</div>' if body else ""


def folded(summary: str, body: str) -> str:
    """Return a body that opens on a click."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


def badge(words: str) -> str:
    """Return words that stand small beside a title."""
    return f'<span class="badge">{text(words)}</span>'


def table(heads: Sequence[str], rows: Sequence[Sequence[object]], num_columns: int = 0) -> str:
    """Return a table whose last num_columns columns hold numbers."""
    first_number = len(rows[0]) - num_columns if rows else 0

    def cells(tag: str, row: Sequence[object]) -> str:
        return "".join(
            f"<{tag}{' class=num' if i >= first_number else ''}>{text(cell)}</{tag}>"
            for i, cell in enumerate(row)
        )

    head = f"<tr>{cells('th', heads)}</tr>" if any(heads) else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="short">{head}{body}</table></div>'


def bars(rows: Sequence[tuple[str, float, str]], faded: set[str]) -> str:
    """Return one bar per row (label, size, the size in words); the labels in `faded` are sums."""
    largest = max((size for _, size, _ in rows), default=0.0) or 1.0
    lines = []
    for label, size, words in rows:
        kind = ' class="faded"' if label in faded else ""
        lines.append(
            f'<span>{text(label)}</span><div class="track">'
            f'<i{kind} style="width:{100 * size / largest:.2f}%"></i></div>'
            f'<span class="num">{text(words)}</span>'
        )
    return f'<div class="bar">{"".join(lines)}</div>'
