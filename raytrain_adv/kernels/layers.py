"""What layers a kernel has, read without running its code: the driver may lack the GPU, the Triton
or the system that the code is for.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from raytrain_adv.errors import JobError


@dataclass(frozen=True)
class Layer:
    """A layer as its source describes it."""

    name: str
    has_backward: bool
    """False where the source says so; a layer that says nothing may still have none."""
    can_torch_compile: bool
    has_state: bool
    """Whether it has a constructor of its own; such a layer cannot stand in for another."""


def read_layers(folder: Path) -> dict[str, Layer]:
    """Return the layers of a build by name.

    Args:
        folder: the build, with __init__.py and layers.py or layers/.

    Raises:
        JobError: when there are no layers, or the source cannot be read.
    """
    roots = [folder, *(p for p in sorted(folder.iterdir()) if (p / "__init__.py").is_file())]
    for root in roots:
        for file in (root / "layers.py", root / "layers" / "__init__.py"):
            if file.is_file():
                return {name: layer for name, layer in _layers(file).items() if name[0] != "_"}
    raise JobError(
        f"the kernel in {folder} has no layers",
        "neither layers.py nor layers/__init__.py",
        "name a kernel that replaces modules; one for attention belongs under flash_attn",
    )


@dataclass(frozen=True)
class _Class:
    """A class of a source file, with the names that its bases are found under."""

    node: ast.ClassDef
    scope: dict[str, _Class]

    def lineage(self) -> list[ast.ClassDef]:
        """Return the class and those of its bases whose source is in the build, the nearest
        first.
        """
        nodes, waiting = [], [self]
        while waiting:
            one = waiting.pop(0)
            if one.node in nodes:
                continue
            nodes.append(one.node)
            names = [base.id for base in one.node.bases if isinstance(base, ast.Name)]
            waiting += [one.scope[name] for name in names if name in one.scope]
        return nodes

    def defines(self, method: str) -> bool:
        """Whether it or a base defines a method."""
        return any(
            isinstance(item, ast.FunctionDef) and item.name == method
            for node in self.lineage()
            for item in node.body
        )

    def flag(self, name: str, default: bool) -> bool:
        """Return a constant of the class or its nearest base that has it."""
        for node in self.lineage():
            for item in node.body:
                if isinstance(item, ast.Assign | ast.AnnAssign):
                    targets = item.targets if isinstance(item, ast.Assign) else [item.target]
                    value = item.value
                    if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                        return bool(value.value) if isinstance(value, ast.Constant) else default
        return default


def _layers(file: Path) -> dict[str, Layer]:
    return {
        name: Layer(
            name,
            has_backward=one.flag("has_backward", True),
            can_torch_compile=one.flag("can_torch_compile", False),
            has_state=one.defines("__init__"),
        )
        for name, one in _classes(file, set()).items()
        if one.defines("forward")
    }


def _classes(file: Path, seen: set[Path]) -> dict[str, _Class]:
    """Return the classes a file defines, or takes from files beside it."""
    if file in seen or not file.is_file():
        return {}
    try:
        tree = ast.parse(file.read_text())
    except (OSError, SyntaxError, ValueError) as error:
        raise JobError(
            "a kernel's layers cannot be read", f"{file}: {error}", "mend that file"
        ) from None
    found: dict[str, _Class] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = _Class(node, found)
        elif isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= _imported(node, file, seen | {file})
    return found


def _imported(node: ast.ImportFrom, file: Path, seen: set[Path]) -> dict[str, _Class]:
    taken: dict[str, _Class] = {}
    for alias in node.names:
        place = file.parent / (node.module or alias.name).replace(".", "/")
        beside = place.with_suffix(".py")
        there = _classes(beside if beside.is_file() else place / "__init__.py", seen)
        if alias.name == "*":
            taken |= there
        elif alias.name in there:
            taken[alias.asname or alias.name] = there[alias.name]
    return taken
