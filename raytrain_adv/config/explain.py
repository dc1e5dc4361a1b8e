"""Describe a feature from the declarations in its file: for `raytrain-adv explain`."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

from raytrain_adv.config import compatibility
from raytrain_adv.config.compatibility import Feature
from raytrain_adv.config.llamafactory.keys import WRITTEN_AS
from raytrain_adv.config.problems import Problem, job_error, show
from raytrain_adv.config.schema import describe, field_schemas
from raytrain_adv.text import nearest

WIDTH = 100


def explain(name: str) -> str:
    """Describe a feature, its keys and its compatibility; of several, the verdict on each pair.

    Args:
        name: its name in the matrix, in any case, or one of its keys; or several of them,
            separated by blanks, commas or plus signs.

    Raises:
        JobError: if there is no such feature, naming the nearest.
    """
    parts = [part for part in re.split(r"[\s,+]+", name.strip()) if part]
    if len(parts) > 1 and _slug(name) not in _known():
        return "\n".join(_together(list(dict.fromkeys(find(part) for part in parts))))
    return "\n".join(_lines(find(name)))


def _together(features: Sequence[Feature]) -> Iterator[str]:
    for pair in combinations(features, 2):
        cell = next(cell for cell in compatibility.cells() if set(cell.features) == set(pair))
        yield f"{' and '.join(one.title for one in cell.features)}: {cell.verdict}"
        yield f"  shown by {cell.test_id}"
        if cell.reason:
            yield from _wrapped(f"{' and '.join(cell.keys)}: {cell.reason}", "  ")
    yield from _wrapped(
        "Keys that exclude each other: raytrain-adv explain "
        + ", raytrain-adv explain ".join(one.slug for one in features),
        "",
    )


def find(name: str) -> Feature:
    """Return the feature that has this name or this key.

    Raises:
        JobError: if there is none, naming the nearest.
    """
    known, wanted = _known(), _slug(name)
    wanted = WRITTEN_AS.get(wanted, wanted)
    if wanted in known:
        return known[wanted]
    near = nearest(wanted, known)
    every = ", ".join(feature.slug for feature in compatibility.features())
    fix = f"did you mean {near}?" if near else f"name one of {every}, or a key of one"
    raise job_error("The command line", [Problem(f"there is no feature {show(name)}", fix)])


def _slug(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _known() -> dict[str, Feature]:
    """Return every feature, by each of its keys and by its name."""
    known: dict[str, Feature] = {}
    for feature in compatibility.features():
        known |= {key: feature for key in feature.kind.model_fields if key not in known}
    return known | {feature.slug: feature for feature in compatibility.features()}


def _lines(feature: Feature) -> Iterator[str]:
    yield f"{feature.title}: {_sentence(feature)}"
    yield f"  {_place(feature)}"
    yield ""
    yield "Keys"
    for key, schema in field_schemas(feature.kind).items():
        default = f"; {show(schema['default'])} by default" if "default" in schema else ""
        yield from _wrapped(f"{key}: {describe(schema)}{default}", "  ")
        yield from _wrapped(str(schema.get("description", "")), "      ")
    yield ""
    yield "Together with"
    found = [cell for cell in compatibility.cells() if feature in cell.features]
    width = max(len(one.title) for one in compatibility.features())
    for cell in sorted(found, key=lambda cell: len(cell.features)):
        title = next((one.title for one in cell.features if one != feature), "no other")
        yield f"  {title.ljust(width)}  {cell.verdict.ljust(7)}  {cell.test_id}"
        if cell.reason:
            yield from _wrapped(f"{' and '.join(cell.keys)}: {cell.reason}", "      ")
    for key, why in compatibility.exceptions(feature).items():
        yield from _wrapped(f"not with {key}: {why}", "  ")
    for key, other, why in compatibility.refused_by_others(feature):
        yield from _wrapped(f"{key} not with {other.title}: {why}", "  ")
    for setting, why in compatibility.needed(feature):
        yield from _wrapped(f"not without {setting}: {why}", "  ")
    if feature.keys:
        yield ""
        yield "Tests turn it on with"
        yield from (f"  {key}: {show(value)}" for key, value in feature.keys.items())


def _sentence(feature: Feature) -> str:
    """Return the first paragraph of the feature's docstring."""
    return (inspect.getdoc(feature.kind) or "").split("\n\n")[0].replace("\n", " ")


def _place(feature: Feature) -> str:
    """Return the path of the feature's file, relative to the package's parent."""
    file = Path(inspect.getfile(feature.kind))
    root = Path(__file__).parent.parent.parent
    return str(file.relative_to(root) if file.is_relative_to(root) else file)


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False
    )
