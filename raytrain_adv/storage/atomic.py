"""Files and folders on local disks that exist whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file in one move: a kill leaves either the old file or the new one. Its folder is
    created; text is encoded as UTF-8, lone surrogates as \\udXXX. Raises OSError.
    """
    if isinstance(data, str):
        data = data.encode("utf-8", errors="backslashreplace")
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_without_space(path: Path, data: bytes) -> bool:
    """Write a file into the space that it has, on a full disk; return whether that is enough. A
    kill may tear it. Raises OSError.
    """
    if path.stat().st_blocks * 512 < len(data):
        return False
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()
    return True


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `path` if the block ends well. Raises OSError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        replace_folder(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(partial: Path, path: Path) -> None:
    """Rename a complete folder to `path`, replacing the one there. Raises OSError."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)
