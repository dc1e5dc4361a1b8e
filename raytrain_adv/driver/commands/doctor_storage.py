"""The doctor's look at a run's storage: checkpoints, Ray's snapshots, what kills leave behind."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

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
from raytrain_adv.driver.commands.finding import FOLDER, Finding, SetAside
from raytrain_adv.errors import StorageError
from raytrain_adv.storage.storage import Storage
from raytrain_adv.text import plural

SNAPSHOT = "checkpoint_manager_snapshot.json"
"""What Ray Train's controller keeps of an attempt (ray 2.60): written in place, so that a kill may
leave half of it."""


@dataclass(frozen=True)
class Seen:
    """A checkpoint's folder."""

    step: int
    attempt: str
    folder: Storage
    found: Found | None
    """None where it is not whole."""
    damage: str
    """What is wrong with it; empty where it is whole."""

    @property
    def name(self) -> str:
        """Its path below the storage's root."""
        return f"{self.attempt}/{self.folder.root.rpartition('/')[2]}"


def checkpoints(root: Storage) -> list[Seen]:
    """Return every checkpoint's folder, newest first, as a rerun looks for one."""
    folders = sorted(all_folders(root), key=lambda entry: entry[:2], reverse=True)
    return [Seen(step, attempt, f, *_looked_at(f)) for step, attempt, f in folders]


def _looked_at(folder: Storage) -> tuple[Found | None, str]:
    """Return a checkpoint, or none and what is wrong with it."""
    manifest = folder.read_json(MANIFEST)
    if manifest is None:
        is_torn = MANIFEST in folder.files()
        if DAMAGED in folder.files():
            return None, "a run found that its files are not what was written"
        killed = f"no {MANIFEST}: it was still being written when the run ended"
        return None, f"its {MANIFEST} is torn" if is_torn else killed
    if manifest.get("format") != FORMAT:
        return None, f"it is of format {manifest.get('format')}; this version reads {FORMAT}"
    try:
        found = find(folder)
    except (AttributeError, KeyError, TypeError) as error:
        return None, f"its {MANIFEST} is not a checkpoint's ({type(error).__name__}: {error})"
    if found is None:
        return None, _wrong_files(folder, manifest["files"])
    if folder.is_local:
        try:
            PlainReader(folder.root)
        except (StorageError, OSError) as error:
            return None, error.found if isinstance(error, StorageError) else str(error)
    wrong = wrong_bytes(folder, rank=0, world_size=1)
    return (None, wrong) if wrong else (found, "")


def _wrong_files(folder: Storage, written: dict[str, int]) -> str:
    sizes = folder.files()
    wrong = [
        f"{name} is missing"
        if name not in sizes
        else f"{name} has {sizes[name]:,} bytes, and {size:,} were written"
        for name, size in written.items()
        if sizes.get(name) != size
    ]
    more = f", and {plural(len(wrong) - 1, 'file')} more" if len(wrong) > 1 else ""
    return wrong[0] + more


def examine(root: Storage, seen: Sequence[Seen], limit: int | None) -> list[Finding]:
    """Return what is wrong with the storage.

    Args:
        root: of the run's checkpoints.
        seen: the checkpoints there.
        limit: save_total_limit.
    """
    findings = [_damaged(root, seen, one) for one in seen if one.damage]
    if limit:
        whole = [one for one in seen if not one.damage]
        findings += [_beyond(root, one, limit) for one in whole[limit:]]
    for attempt in root.folders():
        if attempt != FOLDER:
            findings += _of_attempt(root, attempt, seen, limit)
    return findings


def _taking(root: Storage, name: str) -> Callable[[SetAside], None]:
    return partial(SetAside.take, root=root, name=name)


def _damaged(root: Storage, seen: Sequence[Seen], one: Seen) -> Finding:
    before = next((s for s in seen if not s.damage and s.step <= one.step), None)
    instead = f"step {before.step}" if before else "no step: there is no whole one before it"
    means = f"a rerun that resumes passes over it, and can go on from {instead}"
    if one.folder.read_json(MANIFEST) is not None:
        means += "; save_total_limit may count it and delete a whole one in its place"
    return Finding(one.folder.root, one.damage, means, "set aside", _taking(root, one.name))


def _beyond(root: Storage, one: Seen, limit: int) -> Finding:
    return Finding(
        one.folder.root,
        f"a whole checkpoint, but save_total_limit: {limit} keeps newer ones: the run ended before "
        "it was deleted",
        "none: a rerun resumes from the newest; it takes up room until the next checkpoint",
        "set aside, to be deleted by you",
        _taking(root, one.name),
    )


def _of_attempt(
    root: Storage, attempt: str, seen: Sequence[Seen], limit: int | None
) -> list[Finding]:
    folder = root.folder(attempt)
    files = folder.files()
    findings = [leftover(root, f"{attempt}/{name}") for name in files if name.endswith(".partial")]
    if SNAPSHOT in files:
        findings += _snapshot(root, attempt, seen, limit)
    return findings


def leftover(root: Storage, name: str) -> Finding:
    """Return the finding of a file or folder that was being written when the run ended."""
    return Finding(
        root.path(name),
        "it was still being written when the run ended",
        "none: nothing reads it",
        "set aside",
        _taking(root, name),
    )


def _snapshot(
    root: Storage, attempt: str, seen: Sequence[Seen], limit: int | None
) -> list[Finding]:
    name = f"{attempt}/{SNAPSHOT}"
    means = (
        "none: a rerun has a name of its own in Ray, and resumes by what is in the checkpoints; "
        f"under the name {attempt} Ray Train's controller would not start again"
    )
    fix = "set aside"
    named = _named(root.folder(attempt).read_json(SNAPSHOT))
    if named is None:
        torn = "it is torn, or not what Ray writes"
        return [Finding(root.path(name), torn, means, fix, _taking(root, name))]
    there = set(root.folder(attempt).folders())
    known = {(one.step, one.attempt) for one in seen} | {(_step(one), attempt) for one in named}
    gone = [
        one
        for one in named
        if one not in there and not _is_pruned((_step(one), attempt), known, limit)
    ]
    if not gone:
        return []
    what = f"it names {', '.join(gone)}, which something other than the run has removed"
    return [Finding(root.path(name), what, means, fix, _taking(root, name))]


def _named(snapshot: dict[str, Any] | None) -> list[str] | None:
    """Return the checkpoints that a snapshot names; none where it is not one."""
    try:
        results = snapshot["checkpoint_results"] if snapshot is not None else None
        return None if results is None else [str(one["checkpoint_dir_name"]) for one in results]
    except (KeyError, TypeError):
        return None


def _step(name: str) -> int:
    digits = name.removeprefix("step_")
    return int(digits) if digits.isdigit() else 0


def _is_pruned(
    gone: tuple[int, str], known: Collection[tuple[int, str]], limit: int | None
) -> bool:
    """Whether save_total_limit accounts for a checkpoint's absence: Ray's snapshot goes on naming
    those that the run has deleted.

    Args:
        gone: its step and attempt.
        known: those of all that there are or have been.
        limit: save_total_limit.
    """
    return limit is not None and sum(one > gone for one in known) >= limit
