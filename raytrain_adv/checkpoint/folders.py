"""Checkpoint folders in storage: find the complete ones, and check their files."""

import zlib
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from raytrain_adv.storage.storage import Storage, storage_errors

FORMAT = 1
MANIFEST = "manifest.json"
DAMAGED = "damaged.json"
"""New name of a damaged checkpoint's manifest: the checkpoint no longer counts."""
AGAIN = "r"  # appended to an attempt's name each time the driver restarts it
PIECE = 16 * 2**20  # bytes read at once


@dataclass(frozen=True)
class Progress:
    """Where a run stands: everything a continuation needs besides the tensors."""

    step: int  # optimizer steps done
    global_batch: int  # sequences per optimizer step
    num_sequences: int  # sequences of one epoch; a continuation on other data is refused
    num_tokens: int  # tokens seen by all workers
    window_loss: float  # loss summed since the last logging step; exact in JSON
    window_tokens: float  # label tokens since the last logging step
    num_skipped: int = 0  # updates that were left out because their loss was bad
    recent: list[float] = field(default_factory=list)
    """Losses that the next step's is compared with, if bad_loss_factor is set."""
    skipped_in_a_row: int = 0  # updates that were left out since the last one that was not
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)
    """Step -> loss, and accuracy if it is computed, of the held-out rows."""


@dataclass(frozen=True)
class Found:
    """A complete checkpoint in storage."""

    storage: Storage
    progress: Progress
    fingerprint: str
    keys: dict[str, Any]
    optimizer: bool
    base: str | None = None
    """Fingerprint of what the weights were read from that the checkpoint does not hold, if any."""

    @property
    def path(self) -> str:
        """The folder's full path."""
        return self.storage.root


class _Manifest(BaseModel):
    """What commits a checkpoint, written last."""

    format: Literal[1]
    progress: Progress
    fingerprint: str
    job: dict[str, Any]
    optimizer: bool
    base: str | None = None
    files: dict[str, int]
    crc32: dict[str, int] = {}


def read_manifest(folder: Storage) -> dict[str, Any] | None:
    """Return a checkpoint's manifest; None if there is none, it is torn, or of another form."""
    manifest = folder.read_json(MANIFEST)
    try:
        _Manifest.model_validate(manifest)
    except ValidationError:
        return None
    return manifest


def find(folder: Storage) -> Found | None:
    """Return the checkpoint in this folder if it has a manifest and every file in its size."""
    manifest = read_manifest(folder)
    if manifest is None or wrong_sizes(folder, manifest):
        return None
    known = _Manifest.model_validate(manifest)
    same = (known.progress, known.fingerprint, known.job, known.optimizer, known.base)
    return Found(folder, *same)


def newest(root: Storage, attempt: str | None = None) -> Found | None:
    """Return the newest complete checkpoint, of one attempt and its restarts or of all."""
    for _, name, folder in all_folders(root):
        is_of_it = attempt is None or name.rstrip(AGAIN) == attempt.rstrip(AGAIN)
        found = find(folder) if is_of_it else None
        if found is not None:
            return found
    return None


def all_folders(root: Storage) -> list[tuple[int, str, Storage]]:
    """Return (step, attempt, folder) of every checkpoint folder, complete or not, newest first."""
    found = [
        (int(name.removeprefix("step_")), attempt, root.folder(attempt, name))
        for attempt in root.folders()
        for name in root.folder(attempt).folders()
        if name.startswith("step_") and name.removeprefix("step_").isdigit()
    ]
    return sorted(found, key=lambda entry: entry[:2], reverse=True)


def wrong_sizes(folder: Storage, manifest: dict[str, Any]) -> str:
    """Return what the folder lacks of its manifest's files, in words; empty if nothing."""
    sizes: dict[str, int] = folder.files()
    for name, size in manifest["files"].items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != size:
            return f"{name} has {sizes[name]:,} bytes, and {size:,} were written"
    return ""


def wrong_bytes(folder: Storage, rank: int, world_size: int) -> str:
    """Return what is wrong with this rank's share of the files (empty without kept checksums).
    Raises StorageError when a file cannot be read.
    """
    manifest = read_manifest(folder) or {}
    wrong = []
    for name, written in sorted(manifest.get("crc32", {}).items())[rank::world_size]:
        with (
            storage_errors("The checkpoint cannot be read", folder.path(name)),
            folder.filesystem.open_input_stream(folder.path(name)) as stream,
        ):
            crc = 0
            while piece := stream.read(PIECE):
                crc = zlib.crc32(piece, crc)
            if crc != written:
                wrong.append(f"{name} does not have the bytes that were written (CRC-32)")
    return "\n".join(wrong)


def set_aside(folder: Storage) -> None:
    """Stop counting a damaged checkpoint as one; the next commit deletes it."""
    with storage_errors("A damaged checkpoint cannot be set aside", folder.root):
        folder.filesystem.move(folder.path(MANIFEST), folder.path(DAMAGED))
