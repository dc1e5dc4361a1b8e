"""Read YAML into keys with their lines. Any input is accepted: each error in it is a Problem."""

import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from raytrain_adv.config.problems import Problem, printable, show
from raytrain_adv.text import first_line, nearest

MAX_BYTES = 1_000_000
MAX_DEPTH = 30
MAX_NODES = 20_000
"""Most values in a job, each alias counted at every use; a page of keys has about fifty."""
MAX_DIGITS = 1000
A_PAGE = "name a job file: a page of key: value lines"

_TAGS = {
    f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")
}
_STRING, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


@dataclass(frozen=True)
class Entry:
    """One key's value and its place."""

    value: Any
    where: str
    inner: Mapping[str, str] = field(default_factory=dict)
    """The places of a mapping's keys."""


@dataclass
class Document:
    """The contents of a job file."""

    entries: dict[str, Entry] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


class _TooLarge(ValueError):
    pass


class _Loader(yaml.SafeLoader):
    """Load YAML as LLaMA-Factory does (OmegaConf): 1e-4 is a number; no dates, octal or base 60.

    Composing collects, as problems, what YAML allows and a job does not: repeated keys, keys that
    are not text, other tags, characters that no file can contain, values that contain themselves.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.problems: list[Problem] = []
        self.is_readable = True
        """Whether the values can be constructed in spite of the problems."""
        self._num_values = self._depth = self._deepest = 0
        self._sizes: dict[int, tuple[int, int]] = {}
        """id of a composed node -> the number of its values and the levels below it."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> Any:
        """Compose and check one node; an alias counts as if it were written out."""
        if self.check_event(yaml.AliasEvent):
            node: Any = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                self._refuse(node, "a value that contains itself", "write it out")
            self._count(*self._sizes.get(id(node), (0, 0)))
            return node
        is_key = isinstance(parent, yaml.MappingNode) and index is None
        values_before, deepest_before = self._num_values, self._deepest
        levels = int(self.check_event(yaml.CollectionStartEvent))
        self._deepest = self._depth
        self._count(0 if is_key else 1, levels)
        self._depth += levels
        node = super().compose_node(parent, index)
        self._depth -= levels
        self._sizes[id(node)] = (self._num_values - values_before, self._deepest - self._depth)
        self._deepest = max(self._deepest, deepest_before)
        if not is_key:
            self._check(node)
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Return a whole number of a length that Python reads quickly."""
        digits = self.construct_scalar(node).replace("_", "")
        if len(digits) > MAX_DIGITS:
            raise ValueError(f"a whole number of {len(digits)} digits")
        return int(digits, 0)

    def _count(self, values: int, levels: int) -> None:
        self._num_values += values
        self._deepest = max(self._deepest, self._depth + levels)
        if self._deepest > MAX_DEPTH:
            raise _TooLarge("it is nested too deeply")
        if self._num_values > MAX_NODES:
            raise _TooLarge(f"more than {MAX_NODES} values")

    def _refuse(self, node: yaml.Node, text: str, fix: str) -> None:
        self.problems.append(Problem(text, fix, where=_line(node)))
        self.is_readable = False

    def _check(self, node: yaml.Node) -> None:
        if node.tag not in _TAGS:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            self._refuse(node, f"the tag {show(tag)} is not supported", "write a plain value")
        if isinstance(node, yaml.MappingNode):
            self._check_keys([key for key, _ in node.value if key.tag != _MERGE])
        elif isinstance(node, yaml.ScalarNode):
            if node.tag.endswith(":bool") and node.value.lower() not in self.bool_values:
                text = f"{show(node.value)} is not true or false"
                self._refuse(node, text, "write true or false")
            if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in node.value):
                self._refuse(node, "a character that no file can contain", "remove it")

    def _check_keys(self, keys: list[yaml.Node]) -> None:
        seen: dict[str, yaml.Node] = {}
        for key in keys:
            if not _is_text(key):
                is_scalar = isinstance(key, yaml.ScalarNode)
                text = f"the key {show(key.value) if is_scalar else 'a list or mapping'} is not"
                fix = "put the key in quotes"
                self.problems.append(Problem(f"{text} text", fix, where=_line(key)))
            elif key.value in seen:
                text = f"given twice, first on {_line(seen[key.value])}"
                fix = "keep one of the two lines"
                self.problems.append(Problem(text, fix, printable(key.value), _line(key)))
            else:
                seen[key.value] = key


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.yaml_implicit_resolvers = {
    first: [one for one in resolvers if one[0].rpartition(":")[2] in ("null", "bool", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _pattern in (
    ("int", r"^(?:[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+)$"),
    (
        "float",
        r"^(?:[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN))$",
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(_pattern), list("-+0123456789.")
    )


def read_file(path: Path) -> Document:
    """Return the keys of a job file, with line numbers."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return _refused("it is a folder", f"name a file: {_nearest_file(path) or 'job.yaml'}")
        if not stat.S_ISREG(mode):  # reading a pipe or a device may never end
            fix = "write the job to a file; key=value on the command line changes single keys"
            return _refused("it is a pipe or a device, not a file", fix)
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        found = _nearest_file(path.parent, path.name)
        fix = f"did you mean {found}?" if found else "name a job file"
        return _refused("there is no such file", fix)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return _refused(f"it cannot be read: {reason}", "name a YAML file that this user can read")
    if len(content) > MAX_BYTES:
        return _refused(f"it is larger than {MAX_BYTES} bytes", A_PAGE)
    try:
        return _read_text(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return _refused(f"line {line} is not UTF-8 text", "name a YAML file saved as UTF-8")


def _read_text(text: str) -> Document:
    document = Document()
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None or root.tag.endswith(":null"):
            return _refused("it is empty", "write at least model_name_or_path and output_dir")
        if not isinstance(root, yaml.MappingNode):
            line = show(text.strip().splitlines()[0])
            text = f"it is not a list of key: value lines, but {line}"
            return _refused(text, "write one `key: value` per line")
        document.problems = loader.problems
        if loader.is_readable:
            _construct(loader, root, document.entries)
    except yaml.YAMLError as error:
        document.problems.append(_syntax_problem(error))
    except _TooLarge as error:
        document.problems.append(Problem(str(error), A_PAGE))
    except ValueError as error:
        text = f"a value cannot be read: {error}"
        document.problems.append(Problem(text, "write it as text in quotes"))
    return document


def read_value(text: str) -> Any:
    """Return one YAML value, as written after `key=` on the command line. Raises ValueError if the
    text is not one YAML value.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        for problem in loader.problems:
            raise ValueError(problem.text)
        return None if root is None else loader.construct_object(root, deep=True)
    except yaml.YAMLError as error:
        raise ValueError(_syntax_problem(error).text) from None


def _construct(loader: _Loader, root: yaml.MappingNode, entries: dict[str, Entry]) -> None:
    own = {id(key) for key, _ in root.value}
    loader.flatten_mapping(root)  # puts the keys of `<<: *other` first
    for key, value in root.value:
        if _is_text(key):
            content = loader.construct_object(value, deep=True)
            is_own = id(key) in own
            inner = value.value if is_own and isinstance(value, yaml.MappingNode) else ()
            places = {one.value: _line(one) for one, _ in inner if _is_text(one)}
            entries[key.value] = Entry(content, _line(key if is_own else root), places)


def _is_text(key: yaml.Node) -> bool:
    return isinstance(key, yaml.ScalarNode) and key.tag == _STRING


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _syntax_problem(error: yaml.YAMLError) -> Problem:
    where, detail = "", first_line(error)
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        context = error.context or ""
        if context and error.context_mark and mark and error.context_mark.line < mark.line:
            context += f" begun on line {error.context_mark.line + 1}"
        detail = "; ".join(part for part in (context, error.problem) if part)
    fix = "write `key: value`, and text with : # { [ * & in quotes"
    return Problem(f"broken YAML: {detail}", fix, where=where)


def _refused(text: str, fix: str) -> Document:
    return Document(problems=[Problem(text, fix)])


def _nearest_file(folder: Path, name: str = "") -> str:
    """Return the folder's YAML file with the name nearest to the given one, or an empty string."""
    try:
        files = sorted(p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml"))
    except (OSError, ValueError):
        return ""
    found = nearest(name, files, 0.5) if name else next(iter(files), None)
    return str(folder / found) if found else ""
