"""Delete what overwrite_output_dir replaces, but only once the new run can start."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raytrain_adv.errors import JobError, StorageError
from raytrain_adv.kernels import lock as locks
from raytrain_adv.storage.storage import Storage, storage_errors

ASIDE = f".{locks.FILE_NAME}.replaced"
"""Name of the old run's lock file while the new one's kernels are pinned."""


@dataclass
class Replaced:
    """The content of output_dir that a new run, or sweep, replaces. It stays until workers can be
    started: a refused launch deletes nothing.
    """

    folder: Path
    names: tuple[str, ...]
    """Files and folders there that are deleted."""
    storages: Sequence[Storage]
    """Where its checkpoints are."""
    is_there: bool
    """Whether there is something to lose that has not been deleted yet."""

    def delete(self) -> str:
        """Delete it, except the kernels that the new run has already pinned; return a message.

        Raises:
            StorageError: if it cannot be deleted.
        """
        there = [name for name in self.names if (self.folder / name).exists()]
        elsewhere = [s.root for s in self.storages if s.folders() and not is_inside(s, self.folder)]
        with storage_errors(
            "what overwrite_output_dir replaces cannot be deleted", str(self.folder)
        ):
            self.is_there = False  # a failure from here on leaves part of it deleted
            for storage in self.storages:
                storage.delete()
                if storage.folders():
                    raise OSError(f"{storage.root} is still there")
            for name in self.names:
                if name not in (locks.FILE_NAME, locks.FOLDER):
                    _remove(self.folder / name)
            pinned = self.folder / locks.FILE_NAME
            needed = pinned.read_text() if pinned.is_file() else ""
            for path in (self.folder / locks.FOLDER).glob("*"):
                if path.name not in needed:
                    _remove(path)
            (self.folder / ASIDE).unlink(missing_ok=True)
        what = ", ".join(there + elsewhere)
        return f"overwrite_output_dir: deleted what {self.folder} held: {what}"

    def keep(self) -> str:
        """Restore it as it was found; return a message."""
        put_back(self.folder)
        return (
            f"{self.folder} is unchanged: overwrite_output_dir deletes its content once the "
            "new run is accepted"
        )

    def refuse_to_delete(self, key: str, value: str | None) -> None:
        """Refuse a job that reads what would be deleted.

        Args:
            key: a key of the job. value: what it names, perhaps a path.

        Raises:
            JobError: if it is, or lies in, what would be deleted.
        """
        named = _storage_of(value)
        if named is None:
            return
        places = [Storage.at(str(self.folder / name)) for name in self.names]
        if any(_holds(place, named) for place in (*places, *self.storages)):
            raise JobError(
                f"{key} names what overwrite_output_dir would delete",
                f"{key}: {value}, of the run in output_dir: {self.folder}",
                "choose another output_dir, or move it elsewhere first",
            )


def set_aside(folder: Path) -> None:
    """Keep the old run's lock file: the new run pins its kernels again."""
    if (folder / locks.FILE_NAME).exists():
        (folder / locks.FILE_NAME).replace(folder / ASIDE)


def put_back(folder: Path) -> None:
    """Undo set_aside, also after a launch that was killed."""
    if (folder / ASIDE).exists():
        (folder / ASIDE).replace(folder / locks.FILE_NAME)


def is_inside(storage: Storage, folder: Path) -> bool:
    """Whether a storage lies in a folder."""
    return _holds(Storage.at(str(folder)), storage)


def _storage_of(value: str | None) -> Storage | None:
    """Return the place that a key's value names; None if it names none that exists."""
    if value is None:
        return None
    if "://" not in value:
        path = Path(value).expanduser()
        return Storage.at(str(path)) if path.exists() else None
    try:
        return Storage.at(value)
    except StorageError:
        return None


def _holds(place: Storage, other: Storage) -> bool:
    if place.is_local and other.is_local:
        return Path(other.root).resolve().is_relative_to(Path(place.root).resolve())
    same = place.filesystem == other.filesystem
    return same and f"{other.root}/".startswith(f"{place.root.rstrip('/')}/")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
