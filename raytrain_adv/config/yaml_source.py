"""A YAML document as keys with their lines. Reads any bytes there are: what is wrong becomes a
Problem."""

import difflib
import re
import stat
from collections.abc import Mapping
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
MAX_DIGITS = 1000
A_PAGE = "name a job file: a page of key: value lines"

_TAGS = {
    f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")
}
_STRING, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


@dataclass(frozen=True)
class Entry:
    """One key's value and where it was written."""

    value: Any
    where: str
    inner: Mapping[str, str] = field(default_factory=dict)
    """Where the keys of a mapping were written."""


@dataclass
class Document:
    """What a job file or an override holds."""

    entries: dict[str, Entry] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


class _TooLarge(ValueError):
    """YAML that no job file would hold."""


class _Loader(yaml.SafeLoader):
    """YAML as LLaMA-Factory reads it (through OmegaConf): 1e-4 is a number; no dates, octal or
    base-60 numbers."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        digits = self.construct_scalar(node).replace("_", "")
        if len(digits) > MAX_DIGITS:
            raise ValueError(f"a whole number of {len(digits)} digits")
        return int(digits, 0)


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
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return _refused("it is a folder", f"name a file: {_nearest_file(path) or 'job.yaml'}")
        if not stat.S_ISREG(mode):  # reading a pipe or a device may never end
            return _refused(
                "it is a pipe or a device, not a file",
                "write the job to a file; key=value on the command line changes single keys",
            )
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        nearest = _nearest_file(path.parent, path.name)
        return _refused(
            "there is no such file", f"did you mean {nearest}?" if nearest else "name a job file"
        )
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return _refused(f"it cannot be read: {reason}", "name a YAML file that this user can read")
    if len(content) > MAX_BYTES:
        return _refused(f"it is larger than {MAX_BYTES} bytes", A_PAGE)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return _refused(f"line {line} is not UTF-8 text", "name a YAML file saved as UTF-8")
    return read_text(text)


def read_text(text: str) -> Document:
    """Return the keys of YAML text, with line numbers."""
    document = Document()
    try:
        root = _compose(text)
        if root is None or root.tag.endswith(":null"):
            return _refused("it is empty", "write at least model_name_or_path and output_dir")
        if not isinstance(root, yaml.MappingNode):
            line = show(text.strip().splitlines()[0])
            text = f"it is not a list of key: value lines, but {line}"
            return _refused(text, "write one `key: value` per line")
        walk = _Walk(root)
        document.problems = walk.problems
        if walk.is_readable:
            _construct(root, document)
    except yaml.YAMLError as error:
        document.problems.append(_syntax_problem(error))
    except _TooLarge as error:
        document.problems.append(Problem(str(error), A_PAGE))
    except ValueError as error:
        text = f"a value cannot be read: {error}"
        document.problems.append(Problem(text, "write it as text in quotes"))
    except RecursionError:
        document.problems.append(Problem("it is nested too deeply", A_PAGE))
    return document


def read_value(text: str) -> Any:
    """Return one YAML value, as written after `key=` on the command line.

    Raises:
        ValueError: when the text is not one YAML value.
    """
    try:
        root = _compose(text)
        if root is None:
            return None
        for problem in _Walk(root).problems:
            raise ValueError(problem.text)
        return _constructed(root)
    except yaml.YAMLError as error:
        raise ValueError(_syntax_problem(error).text) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _compose(text: str) -> yaml.Node | None:
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_Loader)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise _TooLarge("it is nested too deeply")
        if count > 3 * MAX_NODES:  # a value has at most three: its key, and a collection's two ends
            raise _TooLarge(f"more than {MAX_NODES} values")
    root: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    return root


def _construct(root: yaml.MappingNode, document: Document) -> None:
    merges = [pair for pair in root.value if pair[0].tag == _MERGE]
    if merges:
        merged = yaml.MappingNode(root.tag, merges, root.start_mark)
        for key, value in _constructed(merged).items():
            document.entries[key] = Entry(value, _line(root))
    for key_node, value_node in root.value:
        if _is_text(key_node):
            entry = Entry(_constructed(value_node), _line(key_node), _lines(value_node))
            document.entries[key_node.value] = entry


def _lines(node: yaml.Node) -> dict[str, str]:
    """Return where the keys of a mapping are written; of any other value there are none."""
    if not isinstance(node, yaml.MappingNode):
        return {}
    return {key.value: _line(key) for key, _ in node.value if _is_text(key)}


def _constructed(node: yaml.Node) -> Any:
    loader = _Loader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()


class _Walk:
    """Finds what YAML allows and a job does not: repeated or non-text keys, other tags, characters
    that no file can hold, values that contain themselves, and aliases that multiply."""

    def __init__(self, root: yaml.Node) -> None:
        self.problems: list[Problem] = []
        self.is_readable = True
        """Whether the values can be made in spite of the problems."""
        self._count = 0
        self._open: set[int] = set()
        self._visit(root)
        if self._count > MAX_NODES:
            text = f"more than {MAX_NODES} values"
            self.problems.append(Problem(text, A_PAGE))

    def _refuse(self, node: yaml.Node, text: str, fix: str) -> None:
        self.problems.append(Problem(text, fix, where=_line(node)))
        self.is_readable = False

    def _visit(self, node: yaml.Node) -> None:
        self._count += 1
        if self._count > MAX_NODES:
            self.is_readable = False
            return
        if node.tag not in _TAGS:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            self._refuse(node, f"the tag {show(tag)} is not read here", "write a plain value")
        if isinstance(node, yaml.ScalarNode):
            self._check_scalar(node)
        elif id(node) in self._open:
            self._refuse(node, "a value that contains itself", "write it out")
        else:
            self._open.add(id(node))
            children = node.value
            if isinstance(node, yaml.MappingNode):
                self._check_keys([key for key, _ in node.value])
                children = [value for _, value in node.value]
            for child in children:
                self._visit(child)
            self._open.discard(id(node))

    def _check_scalar(self, node: yaml.ScalarNode) -> None:
        if node.tag.endswith(":bool") and node.value.lower() not in _Loader.bool_values:
            self._refuse(node, f"{show(node.value)} is not true or false", "write true or false")
        if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in node.value):
            self._refuse(node, "a character that no file can hold", "remove it")

    def _check_keys(self, keys: list[yaml.Node]) -> None:
        seen: dict[str, yaml.Node] = {}
        for key in keys:
            if key.tag == _MERGE:
                continue
            if not _is_text(key):
                written = (
                    show(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                )
                text = f"the key {written} is not text"
                self.problems.append(Problem(text, "put the key in quotes", where=_line(key)))
            elif key.value in seen:
                text = f"given twice, first on {_line(seen[key.value])}"
                fix = "keep one of the two lines"
                self.problems.append(Problem(text, fix, printable(key.value), _line(key)))
            else:
                seen[key.value] = key


def _is_text(key: yaml.Node) -> bool:
    return isinstance(key, yaml.ScalarNode) and key.tag == _STRING


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
