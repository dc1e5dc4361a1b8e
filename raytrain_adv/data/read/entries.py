"""Resolve the job's dataset keys: entries of dataset_info.json, paths, Hub datasets, built-ins."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from raytrain_adv import hub
from raytrain_adv.config.sections import DataConfig
from raytrain_adv.data.read import v1
from raytrain_adv.errors import JobError
from raytrain_adv.text import nearest, parse_json, plural, split_names

REMOTE = "REMOTE:"
"""Beginning of a dataset_dir that is a dataset on the Hub."""
INFO_FILE = "dataset_info.json"
FILE_TYPES = (".json", ".jsonl", ".parquet", ".arrow", ".csv", ".txt")
BUILTIN_SETS = ("python_stdlib_docs", "orders")

Formatting = Literal["alpaca", "sharegpt", "openai"]
Kind = Literal["files", "hub", "builtin"]

_COLUMNS = ("prompt", "query", "response", "history", "messages", "system", "tools")
_OTHER_STAGES = ("images", "videos", "audios", "chosen", "rejected", "kto_tag")
_TAGS = tuple(
    f"{name}_tag"
    for name in ("role", "content", "user", "assistant", "observation", "function", "system")
)
_SOURCES = ("file_name", "hf_hub_url", "builtin")
_MIRRORS = ("ms_hub_url", "om_hub_url")
_REFUSED = ("script_url", "cloud_file_name", *_MIRRORS)
_PLAIN = ("formatting", "subset", "split", "folder", "num_samples", "columns", "tags", "ranking")
_KEYS = (*_SOURCES, *_PLAIN, *_REFUSED)


@dataclass(frozen=True)
class Entry:
    """One dataset of the job."""

    name: str
    """As the job file has it."""
    kind: Kind
    target: str
    """Path of a file or folder, name on the Hub, or name of the built-in set."""
    formatting: Formatting | None = None
    """None: found out from the columns."""
    columns: dict[str, str] | None = None
    """Meaning -> column; None: the usual names."""
    tags: dict[str, str] = field(default_factory=dict)
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: int | None = None
    """Draw this many rows at random, repeating them where there are fewer."""


def resolve(
    names: str | list[str] | None, data: DataConfig, key: str, source: str = ""
) -> list[Entry]:
    """Find every dataset that `names` (the value of `key` in the job's file, `source`) lists.
    Raises JobError for a name that is nowhere to be found, or an entry with a key that cannot be
    honored.
    """
    folder = data.dataset_dir
    if folder.startswith(REMOTE):
        folder = str(_fetch(folder.removeprefix(REMOTE)))
    if folder == "ONLINE":
        fix = "write Hub datasets as owner/name under dataset, and make dataset_dir a folder"
        raise JobError("dataset_dir must be a folder", f"dataset_dir: {folder}", fix)
    info = _read_info(Path(folder))
    return [_resolve_one(name, info, Path(folder), key, source) for name in split_names(names)]


def _fetch(name: str) -> Path:
    """Return the folder of a Hub dataset that has dataset_info.json and the files it names."""
    from huggingface_hub import snapshot_download

    reason = hub.why_unreachable()
    try:
        return Path(snapshot_download(name, repo_type="dataset"))
    except (OSError, ValueError) as error:
        fix = f"make dataset_dir a folder with {INFO_FILE}, or the Hub reachable"
        what = f"dataset_dir {REMOTE}{name} could not be fetched from the Hugging Face Hub"
        raise JobError(what, reason or f"{type(error).__name__}: {error}"[:500], fix) from error


def _read_info(dataset_dir: Path) -> dict[str, Any]:
    path = dataset_dir / INFO_FILE
    try:
        if path.exists() and not path.is_file():  # reading a named pipe would wait for ever
            raise OSError(f"{path} is not a file")
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        fix = "make it a readable UTF-8 file"
        raise JobError(f"{path} cannot be read", str(error), fix) from error
    try:
        info = parse_json(text)
    except ValueError as error:
        found = str(error)
        if isinstance(error, json.JSONDecodeError):
            found = f"line {error.lineno}: {error.msg}"
        raise JobError(f"{path} is not valid JSON", found, "correct it") from error
    if not isinstance(info, dict):
        what = f"{path} must map dataset names to entries"
        raise JobError(what, f"a JSON {type(info).__name__}", "make it an object")
    return info


def _resolve_one(
    name: str, info: dict[str, Any], dataset_dir: Path, key: str, source: str
) -> Entry:
    if name in info:
        return _from_info(name, info[name], dataset_dir)
    if name in BUILTIN_SETS:
        return Entry(name, "builtin", name)
    for path in (Path(name), dataset_dir / name):
        if path.exists():
            return Entry(name, "files", str(path))
    looks_like_path = Path(name).suffix in FILE_TYPES or name.startswith((".", "/"))
    if not looks_like_path and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return Entry(name, "hub", name)
    made_by = _command(source, (Path(name), dataset_dir / name))
    raise _not_found(name, info, dataset_dir, key, made_by)


def _command(source: str, paths: Iterable[Path]) -> str:
    """Return the command in a comment of the job's file that writes one of these paths, or a folder
    above it; empty if there is none.
    """
    try:
        comments = re.findall(r"^#\s*(python .*)", Path(source).read_text("utf-8"), re.MULTILINE)
    except (OSError, UnicodeDecodeError):  # keys that come from no file
        return ""
    for command in comments:
        written = [Path(word) for word in command.split()[2:]]
        if any(path.is_relative_to(one) for path in paths for one in written if one.parts):
            return str(command)
    return ""


def _not_found(
    name: str, info: dict[str, Any], dataset_dir: Path, key: str, made_by: str
) -> JobError:
    folder = Path(name).parent
    beside = folder.iterdir() if folder.is_dir() else ()
    files = [str(folder / p.name) for p in beside if p.is_dir() or p.suffix in FILE_TYPES]
    inside = sorted(dataset_dir.iterdir()) if dataset_dir.is_dir() else []
    there = [p.name for p in inside if p.suffix in FILE_TYPES and p.name != INFO_FILE]
    near = (
        next((file for file in there if Path(file).stem == name), None)
        or nearest(name, [*info, *BUILTIN_SETS, *there])
        or nearest(name, files)
    )
    path = dataset_dir / INFO_FILE
    known = (
        f"{path} names {plural(len(info), 'dataset')}" if path.is_file() else f"there is no {path}"
    )
    other = "correct the name; a Hub dataset is written owner/name"
    fix = f"did you mean {near}?" if near else other
    if made_by:
        fix = f"make it, as a comment of the job's file has it: {made_by}"
    found = f"{key}: {name}; no such file, and {known}"
    return JobError(f"Dataset {name} was not found", found, fix)


def _from_info(name: str, raw: Any, dataset_dir: Path) -> Entry:
    where = f"{dataset_dir / INFO_FILE}, entry {name}"
    if not isinstance(raw, dict):
        fix = 'write {"file_name": "..."}'
        raise JobError("A dataset entry must be an object", f"{where}: {raw!r}", fix)
    if v1.is_entry(raw):
        raise v1.unread(where, {name: raw}, INFO_FILE)
    _refuse_unknown("Unknown key in a dataset entry", where, raw, _KEYS)
    columns = _strings(where, raw, "columns", (*_COLUMNS, *_OTHER_STAGES))
    tags = _strings(where, raw, "tags", _TAGS)
    _refuse_other_stages(where, raw, columns)
    formatting = raw.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        found = f"{where}: formatting {formatting!r}"
        raise JobError("Unknown dataset formatting", found, "use alpaca, sharegpt, openai")
    num_samples = raw.get("num_samples")
    if num_samples is not None and (not isinstance(num_samples, int) or num_samples < 1):
        found = f"{where}: {num_samples!r}"
        raise JobError("num_samples must be a number of rows", found, "use an integer from 1")
    kind, target = _source(where, raw, dataset_dir)
    _refuse_parts(where, raw, kind)
    if kind == "builtin":
        return Entry(name, kind, target, num_samples=num_samples)
    return Entry(
        name, kind, target, formatting, columns if "columns" in raw else None, tags,
        raw.get("subset"), raw.get("split", "train"), raw.get("folder"), num_samples,
    )  # fmt: skip


def _refuse_unknown(what: str, where: str, found: Iterable[str], known: tuple[str, ...]) -> None:
    unknown = [name for name in found if name not in known]
    if unknown:
        near = nearest(unknown[0], known)
        fix = f"did you mean {near}?" if near else f"known: {', '.join(known)}"
        raise JobError(what, f"{where}: {', '.join(unknown)}", fix)


def _strings(where: str, raw: dict[str, Any], key: str, known: tuple[str, ...]) -> dict[str, str]:
    values = raw.get(key, {})
    if not isinstance(values, dict) or not all(isinstance(v, str | None) for v in values.values()):
        fix = f"known names: {', '.join(known)}"
        raise JobError(f"{key} must map names to names", f"{where}: {values!r}", fix)
    _refuse_unknown(f"Unknown name under {key}", where, values, known)
    return {k: v for k, v in values.items() if v}


def _refuse_other_stages(where: str, raw: dict[str, Any], columns: dict[str, str]) -> None:
    refused = [f"columns.{c}" for c in _OTHER_STAGES if c in columns]
    refused += ["ranking"] if raw.get("ranking") else []
    has_source = any(raw.get(key) for key in _SOURCES)
    refused += [key for key in _REFUSED if raw.get(key) and not (key in _MIRRORS and has_source)]
    if refused:
        raise JobError(
            "This dataset cannot be used for supervised fine-tuning on text",
            f"{where}: {', '.join(refused)} cannot be honored",
            "name a dataset with text answers, from file_name or hf_hub_url",
        )


def _refuse_parts(where: str, raw: dict[str, Any], kind: Kind) -> None:
    """Refuse parts of a Hub dataset in an entry of another kind; a file is its train split."""
    parts = [key for key in ("subset", "folder") if raw.get(key)]
    parts += ["split"] if raw.get("split", "train") != "train" else []
    if parts and kind != "hub":
        found = f"{where}: {', '.join(f'{key} {raw[key]!r}' for key in parts)}"
        fix = "delete it, and name the file of those rows"
        raise JobError("Files have no subsets, splits and folders", found, fix)


def _source(where: str, raw: dict[str, Any], dataset_dir: Path) -> tuple[Kind, str]:
    if "builtin" in raw:
        if raw["builtin"] not in BUILTIN_SETS:
            fix = f"known: {', '.join(BUILTIN_SETS)}"
            raise JobError("Unknown built-in dataset", f"{where}: {raw['builtin']!r}", fix)
        return "builtin", raw["builtin"]
    if raw.get("hf_hub_url"):
        return "hub", str(raw["hf_hub_url"])
    if raw.get("file_name"):
        return "files", str(dataset_dir / str(raw["file_name"]))
    fix = "give file_name, hf_hub_url or builtin"
    raise JobError("A dataset entry names no source", where, fix)
