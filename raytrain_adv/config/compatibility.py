"""Which features work together, from their own rules: for the README, `raytrain-adv explain`, and
the tests, one for each cell.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any, Literal

from raytrain_adv.config.discovery import SECTIONS, transform_types
from raytrain_adv.config.section import Section
from raytrain_adv.errors import JobError

Verdict = Literal["yes", "careful", "no"]
TRAINED = "tests/integration/test_matrix.py::test_it_trains_by_its_numbers_resumes_and_exports"
ON_GPU = "tests/gpu/test_matrix_on_gpu.py::test_it_trains_by_its_numbers_on_a_gpu"
REFUSED = "tests/unit/config/test_compatibility.py::test_it_is_refused_with_both_keys"
LETTERS = {TRAINED: "c", ON_GPU: "g", REFUSED: "r"}
"""Test -> its letter in the README's table."""
BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"
"""The README's table is between these two lines."""


@dataclass(frozen=True)
class Feature:
    """A section or transform that has a row and a column."""

    kind: type[Section]
    title: str

    @property
    def slug(self) -> str:
        """Its name in the ids of tests."""
        return self.title.lower().replace(" ", "_")

    @property
    def keys(self) -> dict[str, Any]:
        """The keys and values by which tests turn it on."""
        return dict(self.kind.tried_with)


@dataclass(frozen=True)
class Cell:
    """The verdict on two features together, or on one alone."""

    features: tuple[Feature, ...]
    verdict: Verdict
    reason: str
    """Why they exclude each other or need care; empty if they simply work together."""
    keys: tuple[str, ...] = ()
    """The keys that the rule names."""

    @property
    def slug(self) -> str:
        """Its name in the ids of tests, as `lora+neftune`."""
        return "+".join(one.slug for one in self.features)

    @property
    def test(self) -> str:
        """The test function that proves it."""
        if self.verdict == "no":
            return REFUSED
        return ON_GPU if any(one.kind.needs_gpu for one in self.features) else TRAINED

    @property
    def test_id(self) -> str:
        """The test that proves it, as a pytest node id."""
        return f"{self.test}[{self.slug}]"


def features() -> tuple[Feature, ...]:
    """Return the transforms in the order of application, then the sections that are features."""
    declared = [kind for kind in SECTIONS.values() if kind.feature]
    return tuple(
        Feature(kind, kind.feature or kind.__name__) for kind in (*transform_types(), *declared)
    )


def cells() -> tuple[Cell, ...]:
    """Return a cell for every feature alone and for every pair."""
    return tuple(
        cell_of(*(pair[:1] if pair[0] == pair[1] else pair))
        for pair in combinations_with_replacement(features(), 2)
    )


def cell_of(*pair: Feature) -> Cell:
    """Return the verdict of the rules on one or two features."""
    for verdict in ("no", "careful"):
        for one, other in (pair, pair[::-1]) if len(pair) == 2 else ():
            rules = one.kind.excludes if verdict == "no" else one.kind.careful
            for key in (key for key in rules if is_turned_on_by(other, key)):
                keys = (next(iter(one.keys)), key)
                return Cell(pair, verdict, rules[key], keys)
    return Cell(pair, "yes", "")


def is_turned_on_by(feature: Feature, key: str) -> bool:
    """Whether a key enables a feature, rather than configuring it."""
    return key in feature.kind.model_fields and key in feature.keys


def exceptions(feature: Feature) -> dict[str, str]:
    """Return the keys of no feature that this one excludes or needs care with, and why."""
    others = [one for one in features() if one != feature]
    rules = {**feature.kind.careful, **feature.kind.excludes}
    return {
        key: why
        for key, why in rules.items()
        if not any(is_turned_on_by(other, key) for other in others)
    }


def refused_by_others(feature: Feature) -> Iterable[tuple[str, Feature, str]]:
    """Yield the keys of a feature, except its switches, that another one excludes or needs care
    with; the other feature; and why.
    """
    for other in features():
        if other != feature:
            for key, why in exceptions(other).items():
                if key in feature.kind.model_fields:
                    yield key, other, why


def needed(feature: Feature) -> Iterable[tuple[str, str]]:
    """Yield the settings that a feature requires, as `key: value`, and why."""
    for key, why in feature.kind.needs.items():
        yield f"{key}: {feature.keys[key]}", why


def table() -> str:
    """Return the matrix as a Markdown table, followed by its letters and its rules."""
    every = features()
    known = {frozenset(cell.features): cell for cell in cells()}
    rows = [
        [row.title, *(_shown(known[frozenset((row, column))]) for column in every)] for row in every
    ]
    header = ["", *(one.title for one in every)]
    lines = [_row(header), _row(["---"] * len(header)), *map(_row, rows), ""]
    lines += [
        "Each cell is a parameter of the test that its letter names, as `lora+hf_kernels`:",
        "",
    ]
    lines += [f"- {letter}: `{test}`" for test, letter in LETTERS.items()]
    lines += _reasons()
    return "\n".join(lines)


def update_table(text: str) -> str:
    """Return a page with a current table between its marks.

    Raises:
        JobError: if the page has no marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise JobError("The page has no place for the matrix", "no marks", f"add {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def _row(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _shown(cell: Cell) -> str:
    return f"{cell.verdict} {LETTERS[cell.test]}"


def _reasons() -> Iterable[str]:
    for cell in cells():
        if cell.reason:
            names = " and ".join(one.title for one in cell.features)
            yield f"- {names}, {cell.verdict}: {cell.reason}."
    for feature in features():
        for key, why in exceptions(feature).items():
            yield f"- {feature.title}, not with `{key}`: {why}."
        for setting, why in needed(feature):
            yield f"- {feature.title}, not without `{setting}`: {why}."
