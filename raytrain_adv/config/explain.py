"""What `raytrain-adv explain` prints: a feature, several together, or one key of the job file."""

import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

from raytrain_adv.config.compatibility import (
    Cell,
    Feature,
    cells,
    features,
    known_features,
    rules_of,
    slug_of,
)
from raytrain_adv.config.job import section_types
from raytrain_adv.config.llamafactory.keys import (
    MAPPED,
    REFUSED,
    REFUSED_VALUES,
    RENAMED,
    VALUE_NAMES,
    WRITTEN_AS,
)
from raytrain_adv.config.problems import command_error, show
from raytrain_adv.config.schema import describe, field_schemas, schema
from raytrain_adv.config.sweep import SweepOptions
from raytrain_adv.errors import JobError
from raytrain_adv.text import nearest

WIDTH = 100


def explain(name: str) -> str:
    """Describe a key of the job file, a feature with its keys, or the verdict on each pair of
    several features. Raises JobError if there is no such key or feature, naming the nearest.
    """
    known, properties = known_features(), _properties()
    parts = [name] if slug_of(name) in known else [*filter(None, re.split(r"[\s,+]+", name))]
    slugs = {slug_of(part): part for part in parts}
    ours = {s: s if s in known or s in REFUSED else WRITTEN_AS.get(s, s) for s in slugs}
    named = {ours[s]: part for s, part in slugs.items()}
    if len(parts) > 1:
        if missing := [part for key, part in named.items() if key not in known]:
            raise _unknown("feature", missing[0], [feature.slug for feature in features()])
        return "\n".join(_together(dict.fromkeys(known[key] for key in named)))
    key = next(iter(named), "")
    own = "\n".join(_key(key, properties[key])) if key in properties else ""
    of_feature = "\n".join(_feature(known[key])) if key in known else ""
    if not own and not of_feature:
        own = "\n".join(_of_sweep_or_refused(key))
    if not own and not of_feature:
        every = [*properties, *_options(), *REFUSED, *(feature.slug for feature in features())]
        raise _unknown("key or feature", name, every)
    return "\n\n".join(filter(None, (own, of_feature)))


def _unknown(kind: str, name: str, known: Iterable[str]) -> JobError:
    near = nearest(slug_of(name), known)
    fix = f"did you mean {near}?" if near else "`raytrain-adv schema` lists the keys"
    return command_error(f"there is no {kind} {show(name)}", fix)


@cache
def _properties() -> dict[str, Any]:
    properties: dict[str, Any] = schema()["properties"]
    return properties


@cache
def _options() -> dict[str, Any]:
    return field_schemas(SweepOptions)


def _of_sweep_or_refused(key: str) -> Iterator[str]:
    if key in _options():
        yield from _described(key, _options()[key], "")
        yield "  of the sweep: section; docs/sweeps.md describes it"
    elif key in REFUSED:
        yield from _wrapped(f"{key}: LLaMA-Factory's key, refused: {REFUSED[key].why}", "", "  ")
        yield from _wrapped(f"fix: {REFUSED[key].fix}", "  ", "    ")
        if key in WRITTEN_AS:
            yield f"  other trainers' name of {WRITTEN_AS[key]}"


def _key(key: str, field: dict[str, Any]) -> Iterator[str]:
    yield from _described(key, field, "")
    owner = next((kind for kind in section_types() if key in kind.model_fields), None)
    for line in _of_values(key) if owner is not None else ():
        yield from _wrapped(line, "  ", "    ")
    others = [other for other, ours in (*RENAMED.items(), *WRITTEN_AS.items()) if ours == key]
    if others:
        yield from _wrapped(f"elsewhere called: {', '.join(sorted(set(others)))}", "  ", "    ")
    if owner is not None:
        yield f"  section {owner.__name__}; docs/job_file.md has its other keys"


def _of_values(key: str) -> Iterator[str]:
    """Yield how LLaMA-Factory's values of a key of this package are loaded."""
    if key in MAPPED:
        value, runs_as, why = MAPPED[key]
        names = " and ".join(f"{name}: {show(one)}" for name, one in runs_as.items())
        yield f"{value} runs as {names}: {why}"
    for theirs, ours in VALUE_NAMES.get(key, {}).items():
        yield f"{theirs} runs as {ours}"
    refused: dict[str, list[str]] = {}
    for (name, value), (why, fix) in REFUSED_VALUES.items():
        if name == key:
            refused.setdefault(why or fix, []).append(value)
    for why, values in refused.items():
        yield f"refused: {', '.join(values)}: {why}"


def _described(key: str, field: dict[str, Any], indent: str) -> Iterator[str]:
    default = f"; {show(field['default'])} by default" if "default" in field else ""
    yield from _wrapped(f"{key}: {describe(field)}{default}", indent, indent + "  ")
    yield from _wrapped(str(field.get("description", "")), indent + "  ")


def _together(chosen: Iterable[Feature]) -> Iterator[str]:
    for pair in combinations(chosen, 2):
        cell = next(cell for cell in cells() if set(cell.features) == set(pair))
        yield f"{cell.names}: {cell.verdict}"
        yield f"  shown by {cell.test_id}"
        yield from _reason(cell, "  ")
    commands = ", ".join(f"raytrain-adv explain {one.slug}" for one in chosen)
    yield from _wrapped(f"Keys that exclude each other: {commands}")


def _feature(feature: Feature) -> Iterator[str]:
    summary = (inspect.getdoc(feature.kind) or "").split("\n\n")[0].replace("\n", " ")
    yield f"{feature.title}: {summary}"
    file, root = Path(inspect.getfile(feature.kind)), Path(__file__).parent.parent.parent
    yield f"  {file.relative_to(root) if file.is_relative_to(root) else file}"
    yield from ("", "Keys")
    for key, field in field_schemas(feature.kind).items():
        yield from _described(key, field, "  ")
    yield from ("", "Together with")
    found = [cell for cell in cells() if feature in cell.features]
    width = max(len(one.title) for one in features())
    for cell in sorted(found, key=lambda cell: len(cell.features)):
        title = next((one.title for one in cell.features if one != feature), "no other")
        yield f"  {title.ljust(width)}  {cell.verdict.ljust(7)}  {cell.test_id}"
        yield from _reason(cell, "      ")
    for rule in rules_of(feature):
        yield from _wrapped(rule, "  ")
    if feature.keys:
        yield from ("", "Tests turn it on with")
        yield from (f"  {key}: {show(value)}" for key, value in feature.keys.items())


def _reason(cell: Cell, indent: str) -> list[str]:
    text = f"{' and '.join(cell.keys)}: {cell.reason}" if cell.reason else ""
    return _wrapped(text, indent)


def _wrapped(text: str, indent: str = "", after: str | None = None) -> list[str]:
    after = indent if after is None else after
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=after, break_long_words=False
    )
