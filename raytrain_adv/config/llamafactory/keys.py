"""The tables of keys.yaml: LLaMA-Factory's keys that no section or transform owns."""

from pathlib import Path
from typing import Any, NamedTuple

import yaml


class Key(NamedTuple):
    """A key that is accepted with some values only."""

    accepted: tuple[Any, ...]
    why: str
    """Why another value is refused."""
    fix: str


# libyaml, where PyYAML was built with it, reads the file in 12 ms instead of 220.
_TABLES = yaml.load(
    Path(__file__).with_name("keys.yaml").read_text("utf-8"),
    getattr(yaml, "CSafeLoader", yaml.SafeLoader),
)
_DELETE = "delete it"

RENAMED: dict[str, str] = _TABLES["renamed"]
"""Other name of a key -> its name here; true only while a section or transform owns that name."""
SAME: dict[str, Key] = {
    key: Key(tuple(entry["values"]), entry["why"], entry.get("fix", _DELETE))
    for entry in _TABLES["same"]
    for key in entry["keys"]
}
"""Keys whose listed values mean exactly what this package does."""
LISTED: dict[str, str] = {
    key: entry["why"] for entry in _TABLES["without_effect"] for key in entry["keys"]
}
"""Keys that change nothing here -> why."""
REFUSED: dict[str, Key] = {
    key: Key((default,), entry["why"], entry.get("fix", _DELETE))
    for entry in _TABLES["refused"]
    for key, default in entry["defaults"].items()
}
"""Keys of which only the default is accepted, because it requests nothing."""
REFUSED_VALUES: dict[tuple[str, str], tuple[str, str]] = {
    (entry["key"], value): (entry["why"], entry["fix"])
    for entry in _TABLES["refused_values"]
    for value in entry["values"]
}
"""(key of this package, value that is refused) -> why, and what to do."""
MAPPED: dict[str, tuple[Any, dict[str, Any], str]] = {
    entry["key"]: (entry["value"], entry["runs_as"], entry["why"]) for entry in _TABLES["mapped"]
}
"""Key -> the value that is mapped, the keys here that it stands for, and why."""
FSDP_TUNING = frozenset(_TABLES["fsdp_tuning"])
"""Keys of FSDP's files that tune what FSDP2 does not have."""
FILES: dict[str, tuple[str, str]] = {
    key: (entry["what"], entry["fix"]) for entry in _TABLES["files"] for key in entry["with"]
}
"""A key by which a file is not a training job -> what the file is, and what to do."""
VALUE_NAMES: dict[str, dict[str, str]] = _TABLES["value_names"]
"""Key of this package -> LLaMA-Factory's name of a value -> its name here."""
WRITTEN_AS: dict[str, str] = _TABLES["written_as"]
"""What other trainers call a key -> its name here."""
