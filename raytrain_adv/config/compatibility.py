"""Which features work together, by their own rules: for `explain`, the documentation and tests."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any, Literal

from raytrain_adv.config.job import SECTIONS, transform_types
from raytrain_adv.config.section import Section
from raytrain_adv.errors import JobError

Verdict = Literal["yes", "careful", "no"]
TRAINED = "tests/integration/test_matrix.py::test_it_trains_by_its_numbers_resumes_and_exports"
ON_GPU = "tests/gpu/test_matrix_on_gpu.py::test_it_trains_by_its_numbers_on_a_gpu"
REFUSED = "tests/unit/config/test_compatibility.py::test_it_is_refused_with_both_keys"
LETTERS = {TRAINED: "c", ON_GPU: "g", REFUSED: "r"}
"""Test -> its letter in the table."""
BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"
"""The documentation's table is between these two lines."""


@dataclass(frozen=True)
class Feature:
    """A section or transform that has a row and a column."""

    kind: type[Section]
    title: str

    @property
    def slug(self) -> str:
        """Its name in the ids of tests."""
        return slug_of(self.title)

    @property
    def names(self) -> Iterator[str]:
        """Every name that people read: a title, a transform's in plans and reports, and others."""
        yield from filter(None, (*self.kind.also_called, self.kind.name, self.title))

    @property
    def keys(self) -> dict[str, Any]:
        """The keys and values by which tests turn it on."""
        return dict(self.kind.tried_with)


@dataclass(frozen=True)
class Cell:
    """The verdict on two features together, or on one alone."""

    features: tuple[Feature, ...]
    verdict: Verdict
    reason: str = ""
    """Why they exclude each other or need care; empty if they simply work together."""
    keys: tuple[str, ...] = ()
    """The keys that the rule names."""

    @property
    def slug(self) -> str:
        """Its name in the ids of tests, as `lora+neftune`."""
        return "+".join(one.slug for one in self.features)

    @property
    def names(self) -> str:
        """The titles of its features, joined by "and"."""
        return " and ".join(one.title for one in self.features)

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
    pairs = combinations_with_replacement(features(), 2)
    return tuple(cell_of(*dict.fromkeys(pair)) for pair in pairs)


def cell_of(*pair: Feature) -> Cell:
    """Return the verdict of the rules on one or two features."""
    verdicts: tuple[Verdict, ...] = ("no", "careful")
    for verdict in verdicts:
        for one, other in (pair, pair[::-1]) if len(pair) == 2 else ():
            rules = one.kind.excludes if verdict == "no" else one.kind.careful
            for key in (key for key in rules if _is_turned_on_by(other, key)):
                return Cell(pair, verdict, rules[key], (next(iter(one.keys)), key))
    return Cell(pair, "yes")


def _is_turned_on_by(feature: Feature, key: str) -> bool:
    """Whether a key enables a feature, rather than configuring it."""
    return key in feature.kind.model_fields and key in feature.keys


def exceptions(feature: Feature) -> dict[str, str]:
    """Return the keys of no feature that this one excludes or needs care with, and why."""
    others = [one for one in features() if one != feature]
    return {
        key: why
        for key, why in {**feature.kind.careful, **feature.kind.excludes}.items()
        if not any(_is_turned_on_by(other, key) for other in others)
    }


def _needed(feature: Feature) -> Iterable[tuple[str, str]]:
    """Yield the settings that a feature requires, as `key: value`, and why."""
    for key, why in feature.kind.needs.items():
        yield f"{key}: {feature.keys[key]}", why


def table() -> str:
    """Return the matrix as a Markdown table, followed by its letters and its rules."""
    every = features()
    known = {frozenset(cell.features): f"{cell.verdict} {LETTERS[cell.test]}" for cell in cells()}
    rows = [["", *(one.title for one in every)], ["---"] * (len(every) + 1)]
    rows += [[row.title, *(known[frozenset((row, column))] for column in every)] for row in every]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    note = "Each cell is a parameter of the test that its letter names, as `lora+hf_kernels`:"
    lines += ["", note, "", *(f"- {letter}: `{test}`" for test, letter in LETTERS.items())]
    return "\n".join([*lines, *_reasons()])


def _reasons() -> Iterator[str]:
    for cell in cells():
        if cell.reason:
            yield f"- {cell.names}, {cell.verdict}: {cell.reason}."
    for feature in features():
        for key, why in exceptions(feature).items():
            yield f"- {feature.title}, not with `{key}`: {why}."
        for setting, why in _needed(feature):
            yield f"- {feature.title}, not without `{setting}`: {why}."


def update_table(text: str) -> str:
    """Return a page with a current table between its marks, or raise a JobError without marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise JobError("The page has no place for the matrix", "no marks", f"add {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def slug_of(name: str) -> str:
    """Return a name as keys and the ids of tests have it: `hub kernels` as `hub_kernels`."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def known_features() -> dict[str, Feature]:
    """Return every feature, by each of its keys (the first one's wins), by each of its names."""
    every = features()
    keys = {key: feature for feature in reversed(every) for key in feature.kind.model_fields}
    return keys | {slug_of(name): one for one in every for name in one.names}


def rules_of(feature: Feature) -> Iterator[str]:
    """Yield the rules between single keys: this feature's, and those of others on its keys."""
    for key, why in exceptions(feature).items():
        yield f"not with {key}: {why}"
    for other in features():
        for key, why in exceptions(other).items() if other != feature else ():
            if key in feature.kind.model_fields:
                yield f"{key} not with {other.title}: {why}"
    for setting, why in _needed(feature):
        yield f"not without {setting}: {why}"
