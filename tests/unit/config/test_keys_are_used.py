"""A key that is accepted and ignored does not exist."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import raytrain_adv
from raytrain_adv.config.job import SECTIONS, transform_types
from raytrain_adv.config.section import Section

PACKAGE = Path(raytrain_adv.__file__).parent
FIELDS = [(section, key) for section, kind in SECTIONS.items() for key in kind.model_fields]
TRANSFORM_FIELDS = [(kind, key) for kind in transform_types() for key in kind.model_fields]


class Uses(ast.NodeVisitor):
    """Finds where a key is read: job.train.seed, train.seed after train = job.train, self.rank."""

    def __init__(self) -> None:
        self.found: set[tuple[str, str]] = set()
        self.names: dict[str, set[str]] = {}
        """Local name -> the sections it is assigned from, in this file."""

    def visit_Assign(self, node: ast.Assign) -> None:  # ast's name
        targets, values = node.targets, [node.value]
        if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
            targets, values = node.targets[0].elts, node.value.elts
        for target, value in zip(targets, values, strict=False):
            if isinstance(target, ast.Name) and isinstance(value, ast.Attribute):
                self.names.setdefault(target.id, set()).add(value.attr)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:  # ast's name
        owner = node.value
        if isinstance(owner, ast.Attribute):
            self.found.add((owner.attr, node.attr))
        elif isinstance(owner, ast.Name):
            for section in {owner.id, *self.names.get(owner.id, ())}:
                self.found.add((section, node.attr))
        self.generic_visit(node)


def uses_in(*files: Path) -> set[tuple[str, str]]:
    found = set()
    for file in files:
        uses = Uses()
        tree = ast.parse(file.read_text())
        uses.visit(tree)
        uses.visit(tree)  # a name may be used above the line that assigns it
        found |= uses.found
    return found


OUTSIDE = [f for f in PACKAGE.rglob("*.py") if f.relative_to(PACKAGE).parts[0] != "config"]
USED = uses_in(*OUTSIDE, PACKAGE / "config" / "job.py")


@pytest.mark.parametrize(("section", "key"), FIELDS, ids=[key for _, key in FIELDS])
def test_a_key_that_is_accepted_is_used(section: str, key: str) -> None:
    properties = [
        name
        for name, found in vars(SECTIONS[section]).items()
        if isinstance(found, property) and f"self.{key}" in inspect.getsource(found.fget)
    ]
    assert USED & {(section, name) for name in (key, *properties)}


@pytest.mark.parametrize(("kind", "key"), TRANSFORM_FIELDS, ids=[k for _, k in TRANSFORM_FIELDS])
def test_a_transform_uses_each_of_its_keys(kind: type[Section], key: str) -> None:
    switch = next(iter(kind.model_fields))  # Transform.enabled reads it
    assert key == switch or ("self", key) in uses_in(Path(inspect.getfile(kind)))


def test_a_key_that_nothing_reads_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("t = job.train\nt.used\nother.unused\njob.data.unused\n")
    used = uses_in(tmp_path / "a.py")
    assert ("train", "used") in used
    assert ("train", "unused") not in used
