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


def _layers(file: Path) -> dict[str, Layer]:
    classes = _classes(file, set())
    return {
        name: Layer(
            name,
            has_backward=_flag(node, "has_backward", classes, True),
            can_torch_compile=_flag(node, "can_torch_compile", classes, False),
            has_state=_defines(node, "__init__"),
        )
        for name, node in classes.items()
        if _defines(node, "forward") or any(b in classes for b in _bases(node))
    }


def _classes(file: Path, seen: set[Path]) -> dict[str, ast.ClassDef]:
    """Return the classes a file defines, or takes from files beside it."""
    if file in seen or not file.is_file():
        return {}
    seen.add(file)
    try:
        tree = ast.parse(file.read_text())
    except (OSError, SyntaxError, ValueError) as error:
        raise JobError(
            "a kernel's layers cannot be read", f"{file}: {error}", "mend that file"
        ) from None
    found: dict[str, ast.ClassDef] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.ImportFrom) and node.level == 1:
            for alias in node.names:
                module = node.module or alias.name
                place = file.parent / module.replace(".", "/")
                beside = place.with_suffix(".py")
                there = _classes(beside if beside.is_file() else place / "__init__.py", seen)
                if alias.name == "*":
                    found |= there
                elif alias.name in there:
                    found[alias.asname or alias.name] = there[alias.name]
    return found


def _bases(node: ast.ClassDef) -> list[str]:
    return [base.id for base in node.bases if isinstance(base, ast.Name)]


def _defines(node: ast.ClassDef, method: str) -> bool:
    return any(isinstance(item, ast.FunctionDef) and item.name == method for item in node.body)


def _flag(node: ast.ClassDef, name: str, classes: dict[str, ast.ClassDef], default: bool) -> bool:
    for item in node.body:
        targets = item.targets if isinstance(item, ast.Assign) else []
        if isinstance(item, ast.AnnAssign):
            targets = [item.target]
        if any(isinstance(t, ast.Name) and t.id == name for t in targets):
            value = item.value if isinstance(item, ast.Assign | ast.AnnAssign) else None
            return bool(value.value) if isinstance(value, ast.Constant) else default
    for base in _bases(node):
        if base in classes and classes[base] is not node:
            return _flag(classes[base], name, classes, default)
    return default
