"""What report.html says of the data: sets, lengths, and the rows that could not be used."""

from collections.abc import Mapping
from typing import Any

from raytrain_adv import text as numbers
from raytrain_adv.report.page import text
from raytrain_adv.report.parts import badge, below, card, folded, table

SETS = (("train", "Training", "rows"), ("eval", "Held out", "eval_rows"))


def data_html(data: Mapping[str, Any]) -> str:
    """Return the section's body from the statistics of worker.data; what is missing is left out."""
    cards = [
        _set(title, data.get(name) or {}, data.get(rows) or {})
        for name, title, rows in SETS
        if data.get(name)
    ]
    unusable = _unusable(data)
    known = {"train", "eval", "rows", "eval_rows"}
    rest = [
        (key.replace("_", " "), str(value))
        for key, value in data.items()
        if key not in known and value
    ]
    parts = [f'<div class="two">{"".join(cards)}</div>' if cards else "", unusable]
    if rest:
        parts.append(below(card(table((), rest))))
    return "".join(parts)


def _set(title: str, numbers_of: Mapping[str, Any], rows: Mapping[str, Any]) -> str:
    counted = [
        ("rows read", rows.get("read")),
        ("rows used", rows.get("used")),
        ("conversations", numbers_of.get("rows")),
        ("sequences", numbers_of.get("sequences")),
        ("tokens", numbers_of.get("tokens")),
        ("tokens with loss", numbers_of.get("label_tokens")),
        ("rows cut at cutoff_len", rows.get("truncated")),
        ("rows that cannot be used", rows.get("unusable")),
    ]
    lines = [(label, numbers.count(n)) for label, n in counted if n is not None]
    if numbers_of.get("packing_efficiency") is not None:
        lines.append(("packed", f"{numbers.percent(numbers_of['packing_efficiency'])} full"))
    return card(f"<h3>{title}</h3>{table((), lines, num_columns=1)}{_lengths(numbers_of)}")


def _lengths(numbers_of: Mapping[str, Any]) -> str:
    """Return the histogram of the conversations' lengths, with its percentiles in words."""
    histogram, points = numbers_of.get("histogram"), numbers_of.get("lengths")
    if not histogram or not points:
        return ""
    edges, counts = histogram["edges"], histogram["counts"]
    largest = max(counts, default=0) or 1
    columns = "".join(
        f'<i style="height:{100 * n / largest:.1f}%" '
        f'title="{low:,} to {high - 1:,} tokens: {n:,}"></i>'
        for low, high, n in zip(edges, edges[1:], counts, strict=False)
    )
    words = ", ".join(f"{name} {value:,.0f}" for name, value in points.items())
    return (
        f'<div class="hist" role="img" aria-label="Lengths of the conversations">{columns}</div>'
        f'<div class="ends"><span>{edges[0]:,}</span><span>tokens per conversation</span>'
        f'<span>{edges[-1]:,}</span></div><p class="note">{text(words)}</p>'
    )


def _unusable(data: Mapping[str, Any]) -> str:
    parts = []
    for _, title, name in SETS:
        rows = data.get(name) or {}
        if not rows.get("unusable"):
            continue
        share = f"{rows['unusable']:,} of {rows.get('read', 0):,} rows"
        parts.append(f"<h3>{title}: rows that cannot be used{badge(share)}</h3>")
        reasons = rows.get("unusable_reasons")
        if isinstance(reasons, Mapping):
            counted = [(reason, numbers.count(n)) for reason, n in reasons.items()]
            parts.append(table(("reason", "rows"), counted, num_columns=1))
        examples = rows.get("unusable_examples") or []
        if examples:
            places = [(example["where"], example["reason"]) for example in examples]
            label = (
                f"The first {len(places)}" if len(places) < rows["unusable"] else "Where they are"
            )
            parts.append(folded(label, table(("file:line", "reason"), places)))
    return below(card("".join(parts))) if parts else ""
