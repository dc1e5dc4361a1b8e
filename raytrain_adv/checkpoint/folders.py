"""Whether a checkpoint's files are the bytes that were written."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

from raytrain_adv.storage.storage import Storage, storage_errors

MANIFEST = "manifest.json"
DAMAGED = "damaged.json"
"""What the manifest of a damaged checkpoint is called from then on: it no longer counts."""
PIECE = 16 * 2**20
"""Bytes read at once."""


def checksums(folder: Path, rank: int) -> dict[str, int]:
    """Return name -> CRC-32 of the files that a rank has written into a checkpoint's folder."""
    own = sorted(folder.glob(f"__{rank}_*.distcp"))
    own += [folder / ".metadata"] if rank == 0 else []
    found = {}
    for path in own:
        with path.open("rb") as file:
            found[path.name] = _checksum(file)
    return found


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
    """Return which of this rank's share of the files are not what was written, in words; empty if
    they all are, and for checkpoints from before checksums were kept.

    Raises:
        StorageError: when a file cannot be read.
    """
    manifest = folder.read_json(MANIFEST) or {}
    wrong = []
    for name, written in sorted(manifest.get("crc32", {}).items())[rank::world_size]:
        with (
            storage_errors("The checkpoint cannot be read", folder.path(name)),
            folder.filesystem.open_input_stream(folder.path(name)) as stream,
        ):
            if _checksum(stream) != written:
                wrong.append(f"{name} does not have the bytes that were written (CRC-32)")
    return "\n".join(wrong)


def set_aside(folder: Storage) -> None:
    """Have a damaged checkpoint no longer count as one; the next commit deletes it."""
    with storage_errors("A damaged checkpoint cannot be set aside", folder.root):
        folder.filesystem.move(folder.path(MANIFEST), folder.path(DAMAGED))


def _checksum(file: Any) -> int:
    """Return the checksum of an open file, of Python or of pyarrow."""
    crc = 0
    while piece := file.read(PIECE):
        crc = zlib.crc32(piece, crc)
    return crc
