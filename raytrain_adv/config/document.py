"""A YAML document as keys with their lines. Reads any bytes there are: what is wrong becomes a
Problem."""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from raytrain_adv.config.problems import Problem, printable, show

MAX_BYTES = 1_000_000
MAX_DEPTH = 30
MAX_NODES = 20_000
"""YAML values of a job, with every alias counted as often as it is used: a page of keys has about
fifty."""

_TAGS = {
    f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")
}
_STRING, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


@dataclass(frozen=True)
class Entry:
    """One key's value and where it was written."""

    value: Any
    where: str


@dataclass
class Document:
    """What a job file or an override holds."""

    entries: dict[str, Entry] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


class _Loader(yaml.SafeLoader):
    """YAML as LLaMA-Factory reads it (through OmegaConf): 1e-4 is a number; no dates, octal or
    base-60 numbers."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node).replace("_", ""), 0)


_Loader.yaml_implicit_resolvers = {}
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (
        "bool",
        r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF",
        list("yYnNtTfFoO"),
    ),
    ("int", r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("merge", "<<", ["<"]),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), _first
    )


def read_file(path: Path) -> Document:
    """Return the keys of a job file, with line numbers."""
    try:
        if path.is_dir():
            return _refused("it is a folder", f"name a file: {_nearest_file(path) or 'job.yaml'}")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        nearest = _nearest_file(path.parent, path.name)
        return _refused(
            "there is no such file", f"did you mean {nearest}?" if nearest else "name a job file"
        )
    except (OSError, ValueError) as error:
        return _refused(f"it cannot be read: {error}", "name a YAML file that this user can read")
    if len(content) > MAX_BYTES:
        return _refused(
            f"it is larger than {MAX_BYTES} bytes", "name a job file: a page of key: value lines"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return _refused(f"line {line} is not UTF-8 text", "name a YAML file saved as UTF-8")
    return read_text(text)


def read_text(text: str, where: str = "") -> Document:
    """Return the keys of YAML text. With `where`, all of them are from there instead of from a
    line."""
    document = Document()
    try:
        root = _compose(text)
        document.problems = [p.at(where) for p in _check_nodes(root)] if root else []
        if root is None or document.problems:
            return (
                document
                if root
                else _refused("it is empty", "write at least model_name_or_path and output_dir")
            )
        if not isinstance(root, yaml.MappingNode):
            line = printable(show(text.strip().splitlines()[0]))
            return _refused(
                f"it is not a list of key: value lines, but {line}",
                "write one `key: value` per line",
            )
        _construct(root, document, where)
    except yaml.YAMLError as error:
        document.problems.append(_syntax_problem(error).at(where))
    except ValueError as error:
        text = f"a value cannot be read: {error}"
        document.problems.append(Problem(text, "write it as text in quotes", "", where))
    except RecursionError:
        text = "a value cannot be read: it is nested too deeply"
        document.problems.append(Problem(text, "write a flat list of keys", "", where))
    return document


def read_value(text: str) -> Any:
    """Return one YAML value, as written after `key=` on the command line.

    Raises:
        ValueError: when the text is not one YAML value.
    """
    try:
        root = _compose(text)
        for problem in _check_nodes(root) if root else ():
            raise ValueError(problem.text)
        return None if root is None else _constructed(root)
    except yaml.YAMLError as error:
        raise ValueError(_syntax_problem(error).text) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _compose(text: str) -> yaml.Node | None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
    root: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    return root


def _construct(root: yaml.MappingNode, document: Document, where: str) -> None:
    plain = [pair for pair in root.value if pair[0].tag != _MERGE]
    if len(plain) < len(root.value):
        merged = yaml.MappingNode(
            root.tag, [pair for pair in root.value if pair[0].tag == _MERGE], root.start_mark
        )
        for key, value in _constructed(merged).items():
            document.entries[key] = Entry(value, where or _line(root))
    for key_node, value_node in plain:
        document.entries[key_node.value] = Entry(_constructed(value_node), where or _line(key_node))


def _constructed(node: yaml.Node) -> Any:
    loader = _Loader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()


def _check_nodes(root: yaml.Node) -> list[Problem]:
    """Find what YAML allows and a job does not: repeated or non-text keys, other tags, loops and
    alias bombs."""
    problems: list[Problem] = []
    open_nodes: set[int] = set()
    count = 0

    def visit(node: yaml.Node) -> Iterator[Problem]:
        nonlocal count
        count += 1
        if count > MAX_NODES:
            return
        if node.tag not in _TAGS:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            yield Problem(
                f"the tag {tag} is not read here", "write a plain value", where=_line(node)
            )
        if isinstance(node, yaml.ScalarNode):
            yield from _check_scalar(node)
            return
        if id(node) in open_nodes:
            yield Problem("a value that contains itself", "write it out", where=_line(node))
            return
        open_nodes.add(id(node))
        for child in _children(node):
            yield from child if isinstance(child, list) else visit(child)
        open_nodes.discard(id(node))

    problems.extend(visit(root))
    if count > MAX_NODES:
        problems.append(
            Problem(f"more than {MAX_NODES} values", "name a job file: a page of key: value lines")
        )
    return problems[:100]


def _check_scalar(node: yaml.ScalarNode) -> Iterator[Problem]:
    if node.tag.endswith(":bool") and node.value.lower() not in _Loader.bool_values:
        yield Problem(
            f"{show(node.value)} is not true or false", "write true or false", where=_line(node)
        )
    if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in node.value):
        yield Problem(
            "text holds a character that no file can hold", "remove it", where=_line(node)
        )


def _children(node: yaml.Node) -> Iterator[yaml.Node | list[Problem]]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
        return
    seen: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if key.tag == _MERGE:
            yield value
            continue
        if key.tag != _STRING or not isinstance(key, yaml.ScalarNode):
            written = show(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            yield [
                Problem(f"the key {written} is not text", "put the key in quotes", where=_line(key))
            ]
        elif key.value in seen:
            text = f"given twice, first on {_line(seen[key.value])}"
            yield [Problem(text, "keep one of the two lines", printable(key.value), _line(key))]
        else:
            seen[key.value] = key
        yield value


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _syntax_problem(error: yaml.YAMLError) -> Problem:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        context = error.context or ""
        if context and error.context_mark and mark and error.context_mark.line < mark.line:
            context += f" begun on line {error.context_mark.line + 1}"
        detail = "; ".join(part for part in (context, error.problem) if part)
    else:
        where, detail = "", str(error).splitlines()[0]
    return Problem(
        f"broken YAML: {detail}",
        "write `key: value`, and text with : # { [ * & in quotes",
        where=where,
    )


def _refused(text: str, fix: str) -> Document:
    return Document(problems=[Problem(text, fix)])


def _nearest_file(folder: Path, name: str = "") -> str:
    """Return the YAML file of a folder whose name is nearest to the given one; empty when there is
    none."""
    try:
        files = sorted(p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml"))
    except (OSError, ValueError):
        return ""
    nearest = difflib.get_close_matches(name, files, 1, 0.5) if name else files[:1]
    return str(folder / nearest[0]) if nearest else ""
