"""Dataset files of LLaMA-Factory's v1, which are not read: what to write in their place."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raytrain_adv.config.yaml_source import read_value
from raytrain_adv.errors import JobError

_KEYS = frozenset({"path", "source", "converter", "size", "weight", "streaming", "split"})
_LAYOUTS = ("alpaca", "sharegpt")


def is_entry(raw: Any) -> bool:
    """Return whether an entry is in the form of v1: a path, and nothing of ours."""
    return isinstance(raw, Mapping) and "path" in raw and set(raw) <= _KEYS


def entries_in(file: Path) -> dict[str, Any]:
    """Return the entries of a YAML file of v1; none if it is none."""
    if file.suffix.lower() not in (".yaml", ".yml"):
        return {}
    try:
        found = read_value(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    is_v1 = isinstance(found, dict) and found and all(map(is_entry, found.values()))
    return {str(name): raw for name, raw in found.items()} if is_v1 else {}


def unread(where: str, entries: Mapping[str, Any], info_file: str) -> JobError:
    """Return the error of entries in the form of v1."""
    written = {name: _translated(raw) for name, raw in entries.items()}
    fix = (
        f"write to {info_file} in dataset_dir, paths as seen from there: {json.dumps(written)}\n"
        f"and in the job dataset: {','.join(written)}"
    )
    if any("weight" in raw for raw in entries.values()):
        fix += "\na weight is num_samples: that many times the rows"
    what = "Datasets in the form of LLaMA-Factory's v1 are not read"
    return JobError(what, f"{where}: {', '.join(entries)}", fix)


def _translated(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry of dataset_info.json; rows without a converter are messages of parts."""
    is_on_hub = raw.get("source", "hf_hub") != "local"
    converter = raw.get("converter")
    entry = {
        "hf_hub_url" if is_on_hub else "file_name": str(raw["path"]),
        "formatting": converter if converter in _LAYOUTS else "openai",
    }
    split = {"split": raw["split"]} if is_on_hub and raw.get("split", "train") != "train" else {}
    size = {"num_samples": raw["size"]} if raw.get("size") else {}
    return {**entry, **split, **size}
