"""Tokenized rows on disk: built once, by one process of a file system, and memory-mapped by all.

A cache entry is a folder named by its key, with flat little-endian arrays and meta.json. It is
written next to its final name and renamed, so that it exists whole or not at all; checksums in
meta.json reveal a damaged one.
"""

import errno
import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import numpy as np
from numpy.typing import NDArray

from raytrain_adv.data.batches.sequences import TokenRows
from raytrain_adv.data.tokens.tokenize import Chunk
from raytrain_adv.errors import StorageError
from raytrain_adv.storage.atomic import atomic_folder
from raytrain_adv.storage.user_cache import user_cache
from raytrain_adv.text import GIB

VERSION = 6
"""Part of every key: raise it when the files' form, or the way rows become tokens, changes."""

_ARRAYS = {"ids": "<i4", "trained": "|b1", "offsets": "<i8", "answer_starts": "<i4"}
_SECONDS_BETWEEN_LINES = 30.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class CacheEntry:
    """A tokenized dataset and the counts of its making."""

    rows: TokenRows
    stats: dict[str, Any]
    path: Path


def cache_root(tokenized_path: str | None) -> Path:
    """Return the folder of cache entries: the job's, or the user's cache folder."""
    return Path(tokenized_path) if tokenized_path else user_cache("tokenized")


def open_or_build(
    root: Path, key: str, build: Callable[["CacheWriter"], dict[str, Any]], rebuild: bool, say: Say
) -> CacheEntry:
    """Open the entry `key`; build it first if it is missing, damaged, or `rebuild` is set.

    `key` is a hash of everything that decides the contents; `build` writes the rows and returns its
    counts; `say` prints a sentence. Raises StorageError if it cannot be written, or the folder
    cannot be locked.
    """
    path = root / key
    if not rebuild and (found := _open(path)):
        return found
    with _guarding_storage(root):
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{key}.lock", say):
            if not rebuild and (found := _open(path)):
                return found
            if path.exists() and not rebuild:
                say(f"The tokenized data in {path} is damaged; it is built again")
            for left in root.glob(f".{key}.*.partial"):  # of processes that died: the lock is ours
                shutil.rmtree(left, ignore_errors=True)
            with atomic_folder(path) as partial, CacheWriter(partial) as writer:
                writer.finish(build(writer))
    built = _open(path)
    if built is None:
        what = "Tokenized data that was just written cannot be read back"
        raise StorageError(what, str(path), "check that disk")
    return built


def _open(path: Path) -> CacheEntry | None:
    """Open an entry; None if it is missing or not exactly what was written."""
    try:
        meta = json.loads((path / "meta.json").read_text())
        arrays = {name: _map(path / f"{name}.bin", kind) for name, kind in _ARRAYS.items()}
        sums = {name: zlib.crc32(array.data) for name, array in arrays.items()}
        if meta["version"] != VERSION or meta["crc32"] != sums:
            return None
        return CacheEntry(TokenRows(**arrays), meta["stats"], path)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _map(path: Path, kind: str) -> NDArray[Any]:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype=kind)
    return np.memmap(path, dtype=kind, mode="r")


@contextmanager
def _guarding_storage(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(root).free / GIB if root.is_dir() else 0.0
        found = f"{error.strerror or error}: {root} ({free:.1f} GiB free)"
        fix = "free space there, or set tokenized_path to a folder on another disk"
        if error.errno in (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE):
            found = f"{error.strerror}"
            fix = "lower preprocessing_num_workers, or raise the limits of memory and processes"
        raise StorageError("Tokenized data could not be written", found, fix) from error


@contextmanager
def _locked(path: Path, say: Say) -> Iterator[None]:
    lock = filelock.FileLock(path)
    last_line = 0.0
    while True:
        try:
            lock.acquire(timeout=1.0)
            break
        except filelock.Timeout:
            if time.monotonic() - last_line > _SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                say(f"Waiting for another process that tokenizes the same data ({path})")
        except NotImplementedError as error:
            raise OSError(None, "this file system has no file locks") from error
    try:
        yield
    finally:
        lock.release()


class CacheWriter:
    """Appends chunks to an entry's arrays."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, BinaryIO] = {}
        self.sums = dict.fromkeys(_ARRAYS, 0)
        self.num_tokens = 0

    def __enter__(self) -> "CacheWriter":
        self.files = {name: (self.folder / f"{name}.bin").open("wb") for name in _ARRAYS}
        self._append("offsets", np.zeros(1))
        return self

    def __exit__(self, *error: object) -> None:
        for file in self.files.values():
            file.close()

    def append(self, chunk: Chunk) -> None:
        """Write a chunk's rows."""
        self._append("ids", chunk.ids)
        self._append("trained", chunk.trained)
        self._append("offsets", self.num_tokens + np.cumsum(chunk.lengths))
        self._append("answer_starts", chunk.answer_starts)
        self.num_tokens += len(chunk.ids)

    def _append(self, name: str, values: NDArray[Any]) -> None:
        data = values.astype(_ARRAYS[name]).tobytes()
        self.files[name].write(data)
        self.sums[name] = zlib.crc32(data, self.sums[name])

    def finish(self, stats: dict[str, Any]) -> None:
        """Write meta.json, without which the entry does not count."""
        meta = {"version": VERSION, "crc32": self.sums, "stats": stats}
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=1))
