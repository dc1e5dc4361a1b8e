"""Damage of checkpoints, metrics rows and model folders, for the doctor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from raytrain_adv.checkpoint.folders import (
    DAMAGED,
    FORMAT,
    MANIFEST,
    Found,
    all_folders,
    find,
    wrong_bytes,
)
from raytrain_adv.checkpoint.load import PlainReader
from raytrain_adv.driver.output.output_dir import Record
from raytrain_adv.errors import JobError, StorageError
from raytrain_adv.model.weight_files import CheckpointFiles
from raytrain_adv.storage.storage import Storage
from raytrain_adv.text import listed

ROWS_LOST = "rows_lost"
"""The event that records which steps have no row."""
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
MISSING = "it is missing"
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's state of an attempt (ray 2.60). Ray writes it in place: a kill may truncate it."""


@dataclass(frozen=True)
class Seen:
    """A checkpoint's folder."""

    step: int
    attempt: str
    folder: Storage
    found: Found | None
    """None for a damaged checkpoint."""
    damage: str
    """Empty for a sound one."""

    @property
    def name(self) -> str:
        """Its path below the storage's root."""
        return f"{self.attempt}/{self.folder.root.rpartition('/')[2]}"


def checkpoints(root: Storage) -> list[Seen]:
    """Return every checkpoint's folder, newest first, as a rerun searches them."""
    folders = sorted(all_folders(root), key=lambda entry: entry[:2], reverse=True)
    return [Seen(step, attempt, f, *check(f)) for step, attempt, f in folders]


def check(folder: Storage) -> tuple[Found | None, str]:
    """Return a checkpoint, or None and what is wrong with it."""
    manifest = folder.read_json(MANIFEST)
    if manifest is None:
        if DAMAGED in folder.files():
            return None, "a run found that its files are not what was written"
        if MANIFEST in folder.files():
            return None, f"its {MANIFEST} is torn"
        return None, f"no {MANIFEST}: it was still being written when the run ended"
    if manifest.get("format") != FORMAT:
        return None, f"it is of format {manifest.get('format')}; this version reads {FORMAT}"
    try:
        found = find(folder)
        if found is not None and folder.is_local:
            PlainReader(folder.root)
    except (AttributeError, KeyError, TypeError) as error:
        return None, f"its {MANIFEST} is not a checkpoint's ({type(error).__name__}: {error})"
    except (StorageError, OSError) as error:
        return None, error.found if isinstance(error, StorageError) else str(error)
    if found is None:
        return None, _wrong_files(folder.files(), manifest["files"])
    wrong = wrong_bytes(folder, rank=0, world_size=1)
    return (None, wrong) if wrong else (found, "")


def _wrong_files(sizes: dict[str, int], written: dict[str, int]) -> str:
    wrong = [
        f"{name} has {sizes[name]:,} bytes, and {size:,} were written"
        if name in sizes
        else f"{name} is missing"
        for name, size in written.items()
        if sizes.get(name) != size
    ]
    return listed(wrong, 1)


def wrong_snapshot(storage: Storage, attempt: str, seen: Sequence[Seen], limit: int | None) -> str:
    """Return what is wrong with Ray's snapshot; it still names checkpoints that the run deleted
    by save_total_limit, which is not wrong.
    """
    snapshot = storage.folder(attempt).read_json(SNAPSHOT)
    try:
        results = snapshot["checkpoint_results"] if snapshot is not None else None
        names = [str(one["checkpoint_dir_name"]) for one in results or ()]
    except (KeyError, TypeError):
        results = None
    if results is None:
        return "it is torn, or not what Ray writes"
    there = storage.folder(attempt).folders()
    known = {(one.step, one.attempt) for one in seen}
    known |= {(_step(name), attempt) for name in names}

    def is_pruned(name: str) -> bool:
        newer = sum(one > (_step(name), attempt) for one in known)
        return limit is not None and newer >= limit

    gone = [name for name in names if name not in there and not is_pruned(name)]
    removed = "which something other than the run has removed"
    return f"it names {', '.join(gone)}, {removed}" if gone else ""


def _step(name: str) -> int:
    digits = name.removeprefix("step_")
    return int(digits) if digits.isdigit() else 0


def without_repeats(rows: Sequence[Record]) -> list[dict[str, Any]]:
    """Return the rows without those whose kind and step occur again later; events all stay."""
    last = {(row["kind"], row.get("step")): number for number, row in enumerate(rows)}
    return [
        dict(row)
        for number, row in enumerate(rows)
        if row["kind"] == "event" or last[row["kind"], row.get("step")] == number
    ]


def repeated(rows: Sequence[Record]) -> list[str]:
    """Return the steps that have more than one row of a kind."""
    found = Counter((row["kind"], row["step"]) for row in rows if "step" in row)
    steps = {step for (kind, step), n in found.items() if n > 1 and kind != "event"}
    return [str(step) for step in sorted(steps)]


def gaps(rows: Sequence[Record], every: int, reached: int) -> list[tuple[int, int]]:
    """Return the (first, last) steps that have no training row and should have one.

    Args:
        rows: of metrics.jsonl.
        every: logging_steps; it was larger where rows lie further apart before or after.
        reached: a step that the run has certainly reached.
    """
    noted = {row.get("first") for row in rows if row.get("event") == ROWS_LOST}
    starts = [row.get("resumed_from_step") or 0 for row in rows if row.get("event") == "plan"]
    steps = [row["step"] for row in rows if row["kind"] == "train" and "step" in row]
    steps = [*(starts[:1] or [0]), *steps]
    apart = [after - before for before, after in pairwise(steps)]
    found = []
    for place, distance in enumerate(apart):
        neighbors = [*apart[max(place - 1, 0) : place], *apart[place + 1 : place + 2]]
        if distance > max(every, *neighbors, 0):
            found.append((steps[place] + 1, steps[place + 1] - 1))
    if reached - reached % every > steps[-1]:
        found.append((steps[-1] + 1, reached - reached % every))
    return [one for one in found if one[0] not in noted]


def wrong_with_model(path: Path) -> str:
    """Return what is wrong with a folder of a model, an adapter, or both; empty if nothing."""
    if not path.exists():
        return MISSING
    names = {file.name for file in path.iterdir()}
    if names & set(ADAPTER):
        if absent := sorted(set(ADAPTER) - names):
            return f"{absent[0]} is missing"
        try:
            with safe_open(path / ADAPTER[1], framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{ADAPTER[1]} cannot be read: {error}"
        if "config.json" not in names:
            return ""
    if "config.json" not in names:
        return "config.json is missing"
    try:
        with CheckpointFiles(path):
            return ""
    except JobError as error:
        return f"{error.what.removeprefix(f'{path} ').removeprefix(f'{path}/')}: {error.found}"
