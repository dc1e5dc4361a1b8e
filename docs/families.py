"""The table of model families against features, made from docs/families.json."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

FILE = Path(__file__).with_name("families.json")


def page() -> str:
    """Return the counts, the table, and the reason of each cell that is not right."""
    stored = json.loads(FILE.read_text())
    held: dict[str, dict[str, str]] = stored["families"]
    features = list(dict.fromkeys(feature for row in held.values() for feature in row))
    seeing, refusing = (
        [kind for kind, row in held.items() if row and all(text in t for t in row.values())]
        for text in (SEES, "apart: ")
    )
    counted = [row for kind, row in held.items() if kind not in (*seeing, *refusing)]
    words = Counter(_word(row.get(f, "")) for row in counted for f in features)
    tried = sum(words.values()) - words[UNTRIED]
    shares = {word: f"{words[word]:,} {word} ({words[word] / max(tried, 1):.1%})" for word in WORDS}
    counts = ", ".join(text for word, text in shares.items() if words[word])
    lines = [
        f"transformers {stored['transformers']}: {len(held)} families, {tried:,} of "
        f"{len(counted) * len(features):,} cells were tried: {counts}. Counted apart, as they see "
        f"the tokens that they would be trained to predict: {', '.join(seeing) or 'none'}; and as "
        "their own forward pass in transformers takes no text without images or sound, or gives "
        f"logits of other tokens: {', '.join(refusing) or 'none'}.",
        "",
        f"| family | {' | '.join(features)} |",
        f"| --- |{' --- |' * len(features)}",
    ]
    lines += [
        f"| {kind} | {' | '.join(_word(row.get(f, '')) for f in features)} |"
        for kind, row in held.items()
        if row
    ]
    untried = [kind for kind, row in held.items() if not row]
    if untried:
        lines += ["", f"Not tried yet: {', '.join(untried)}."]
    reasons = [line for kind, row in held.items() for line in _reasons(kind, row)]
    return "\n".join([*lines, "", *(reasons or ["Every tried cell is right."])])


def _reasons(kind: str, row: dict[str, str]) -> Iterator[str]:
    """Yield a line for each reason of a family, with the features that have it."""
    found: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    for feature, text in row.items():
        if text != "right":
            alike = re.sub(r"[\d.]+|`", "", text)[:REASON]
            found.setdefault(alike, []).append(feature)
            texts.setdefault(alike, text.replace("`", ""))
    for alike, features in found.items():
        yield f"- {kind}, {', '.join(features)}: `{texts[alike]}`"


REASON = 60
"""Letters in which two reasons of a family differ."""
SEES = "sees the tokens that it would be trained to predict"
UNTRIED = "-"
WORDS = ("right", "refused", "wrong", "traceback")


def _word(text: str) -> str:
    word = text.partition(":")[0]
    return word if word in WORDS else UNTRIED
