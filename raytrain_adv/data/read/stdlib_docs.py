"""The built-in dataset: questions about the standard library, answered by its documentation.

The rows come from the sources of the running Python, which are parsed and never imported, and from
a few modules written in C.
"""

import ast
import builtins
import hashlib
import inspect
import itertools
import math
import sys
import sysconfig
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from raytrain_adv.data.read.sources import Row

MAX_ANSWER = 200
"""Characters; an answer is as many whole paragraphs as fit, at least the first."""

_LEFT_OUT = frozenset(
    ("test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "distutils")
)
_C_MODULES = (builtins, math, itertools, time, sys)
_DOCUMENTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_ASK_BY_NAME = (
    "What does {kind} `{name}` do?",
    "Explain `{name}`.",
    "Describe the {kind} `{name}` of the Python standard library.",
    "What is `{name}` for?",
)
_ASK_BY_SIGNATURE = (
    "What does `{signature}` do?",
    "Explain the call `{signature}`.",
    "Document this {kind}:\n{signature}",
    "Write the docstring of `{signature}`.",
)


@dataclass(frozen=True)
class _Item:
    name: str
    kind: str
    signature: str
    docstring: str
    where: str


def fingerprint() -> str:
    """Hash the sources the rows are made from."""
    digest = hashlib.sha256(sys.version.encode())
    for file in _source_files():
        digest.update(file.read_bytes())
    return digest.hexdigest()


def rows() -> Iterator[Row]:
    """Yield two alpaca rows of each documented object: asked by name, and by signature."""
    files = _source_files()
    for number, file in enumerate(files, 1):
        for item in _items_of_file(file):
            yield from _pairs(item, number / (len(files) + 1))
    for item in _items_in_c():
        yield from _pairs(item, 1.0)


@lru_cache(maxsize=1)
def _source_files() -> tuple[Path, ...]:
    """List the library's public modules, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        public = all(part.isidentifier() for part in parts)  # site-packages is none
        public &= not any(part.startswith("_") and part != "__init__" for part in parts)
        if public and not _LEFT_OUT.intersection(parts):
            found.append(file)
    return tuple(found)


def _items_of_file(file: Path) -> Iterator[_Item]:
    root = Path(sysconfig.get_path("stdlib"))
    parts = list(file.relative_to(root).with_suffix("").parts)
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:  # a library may carry templates that are not Python
        return
    if docstring := ast.get_docstring(tree):
        yield _Item(module, "module", f"import {module}", docstring, f"{file}:1")
    yield from _items_in(tree.body, module, "function", file)


def _items_in(body: list[ast.stmt], owner: str, function: str, file: Path) -> Iterator[_Item]:
    for node in body:
        if not isinstance(node, _DOCUMENTED) or node.name.startswith("_"):
            continue
        name, where = f"{owner}.{node.name}", f"{file}:{node.lineno}"
        docstring = ast.get_docstring(node)
        if isinstance(node, ast.ClassDef):
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            signature = f"class {name}({bases})" if bases else f"class {name}"
            if docstring:
                yield _Item(name, "class", signature, docstring, where)
            yield from _items_in(node.body, name, "method", file)
        elif docstring:
            yield _Item(name, function, f"{name}({ast.unparse(node.args)})", docstring, where)


def _items_in_c() -> Iterator[_Item]:
    for module in _C_MODULES:
        for short, value in sorted(vars(module).items()):
            docstring = inspect.getdoc(value) if callable(value) else None
            if short.startswith("_") or not docstring:
                continue
            where = f"{module.__name__}.{short}"
            name = short if module is builtins else where
            kind = "class" if inspect.isclass(value) else "function"
            yield _Item(name, kind, f"{name}{_signature(value)}", docstring, where)


def _signature(value: object) -> str:
    try:
        return str(inspect.signature(value))  # type: ignore[arg-type]  # callable() checked it
    except (TypeError, ValueError):  # C functions without one
        return "(...)"


def _pairs(item: _Item, progress: float) -> Iterator[Row]:
    answer = _answer(item.docstring)
    if not answer:
        return
    for forms in (_ASK_BY_NAME, _ASK_BY_SIGNATURE):
        form = forms[zlib.crc32(item.name.encode()) % len(forms)]
        question = form.format(kind=item.kind, name=item.name, signature=item.signature)
        yield Row(item.where, {"instruction": question, "output": answer}, progress)


def _answer(docstring: str) -> str:
    """Return the first paragraph, and as many more as fit."""
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    taken = paragraphs[0]
    for paragraph in paragraphs[1:]:
        if len(taken) + len(paragraph) + 2 > MAX_ANSWER:
            break
        taken += "\n\n" + paragraph
    return taken.strip() if len(taken) <= 2 * MAX_ANSWER else ""
