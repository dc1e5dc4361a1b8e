"""Files on any storage that Ray takes: a folder, s3://, gs://, and the rest of pyarrow's."""

import json
import os
import posixpath
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from raytrain_adv.errors import StorageError
from raytrain_adv.storage.atomic import write_atomic
from raytrain_adv.text import GIB


@contextmanager
def storage_errors(what: str, where: str) -> Iterator[None]:
    """Turn an OSError into a StorageError that names the place."""
    try:
        yield
    except OSError as error:
        fix = (
            "free space, or choose another output_dir or ray_storage_path; then run again "
            "with resume_from_checkpoint: true"
        )
        raise StorageError(what, f"{where}: {error}", fix) from error


def free_space(path: Path) -> str:
    """Return the free space of a path's disk, in words."""
    parent = next(p for p in (path, *path.parents) if p.exists())
    return f"{shutil.disk_usage(parent).free / GIB:.1f} GiB free on the disk of {parent}"


CLAIM_S = 1.0  # longest time between the look of another process and its writing


def _create(path: Path, text: str) -> bool:
    """Write a file that is not there; return whether it was not."""
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


@dataclass(frozen=True)
class Storage:
    """A folder on a file system."""

    filesystem: pafs.FileSystem
    root: str

    @classmethod
    def at(cls, path_or_uri: str) -> "Storage":
        """Open a local path or a URI. Raises StorageError if no file system serves the URI."""
        try:
            if "://" in path_or_uri:
                filesystem, root = pafs.FileSystem.from_uri(path_or_uri)
                return cls(filesystem, root)
        except (OSError, ValueError, ImportError) as error:
            raise StorageError(
                "The storage path cannot be opened",
                f"{path_or_uri}: {error}",
                "give a path that all nodes share, or an s3:// or gs:// URI",
            ) from error
        return cls(pafs.LocalFileSystem(), os.path.abspath(path_or_uri))

    @property
    def is_local(self) -> bool:
        """Whether paths can be opened with the operating system's calls (a shared mount counts)."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def path(self, *parts: str) -> str:
        """Return the full path of a file or folder below the root."""
        return posixpath.join(self.root, *parts)

    def folder(self, *parts: str) -> "Storage":
        """Return a folder below this one, as its own storage."""
        return Storage(self.filesystem, self.path(*parts))

    def make(self) -> None:
        """Create this folder and its parents."""
        with storage_errors("The storage folder cannot be created", self.root):
            self.filesystem.create_dir(self.root, recursive=True)

    def folders(self) -> list[str]:
        """Return the names of the folders in this one; none when it does not exist."""
        return [name for name, info in self._list() if info.type == pafs.FileType.Directory]

    def files(self) -> dict[str, int]:
        """Return name -> size in bytes of the files in this folder."""
        return {name: info.size for name, info in self._list() if info.type == pafs.FileType.File}

    def _list(self) -> list[tuple[str, pafs.FileInfo]]:
        infos = self.filesystem.get_file_info(pafs.FileSelector(self.root, allow_not_found=True))
        return sorted((posixpath.basename(info.path), info) for info in infos)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write a file that exists whole or not at all."""
        data = json.dumps(value, indent=1).encode()
        with storage_errors("A file cannot be written", self.path(name)):
            if not self.is_local:  # an object appears whole when its stream closes
                with self.filesystem.open_output_stream(self.path(name)) as stream:
                    stream.write(data)
                return
            write_atomic(Path(self.path(name)), data)

    def claim(self, name: str, value: dict[str, Any]) -> dict[str, Any]:
        """Write a JSON file unless it is there, and return what is there afterward: of several
        processes at once one wins, and all return its value. Empty if the file is torn.

        Object stores have no exclusive creation in pyarrow (25): the last writer wins, so that also
        one that finds a value waits for those that found none a moment earlier.
        """
        found = self.read_json(name)
        if found is not None and self.is_local:
            return found
        self.make()
        if not self.is_local:
            if found is None:
                self.write_json(name, value)
        else:
            with storage_errors("A file cannot be written", self.path(name)):
                if _create(Path(self.path(name)), json.dumps(value, indent=1)):
                    return value
        time.sleep(CLAIM_S)  # until the other has written
        return self.read_json(name) or {}

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return a JSON object, or None when the file is missing or torn."""
        try:
            with self.filesystem.open_input_stream(self.path(name)) as stream:
                value = json.loads(stream.read())
        except (FileNotFoundError, ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None

    def delete(self, *parts: str) -> None:
        """Delete a folder and what is in it; nothing happens when it is not there."""
        path = self.path(*parts)
        if self.is_local:
            shutil.rmtree(path, ignore_errors=True)
        elif self.filesystem.get_file_info(path).type == pafs.FileType.Directory:
            self.filesystem.delete_dir(path)

    def move(self, name: str, target: str) -> None:
        """Move a file or folder of this one to a full path of the same file system."""
        with storage_errors("Something cannot be moved", self.path(name)):
            if self.is_local:
                shutil.move(self.path(name), target)
                return
            # Object stores rename no folders.
            files, path = self.filesystem, self.path(name)
            is_folder = files.get_file_info(path).type == pafs.FileType.Directory
            if is_folder:
                files.create_dir(target, recursive=True)
            pafs.copy_files(path, target, files, files)
            (files.delete_dir if is_folder else files.delete_file)(path)

    def upload(self, local: str) -> None:
        """Copy the files of a local folder into this one."""
        with storage_errors("The checkpoint cannot be uploaded", self.root):
            self.filesystem.create_dir(self.root, recursive=True)
            pafs.copy_files(local, self.root, pafs.LocalFileSystem(), self.filesystem)

    def download(self, local: str) -> None:
        """Copy this folder's files into a local one."""
        with storage_errors("The checkpoint cannot be downloaded", self.root):
            pafs.copy_files(self.root, local, self.filesystem, pafs.LocalFileSystem())

    @contextmanager
    def local_copy(self) -> Iterator[str]:
        """Yield this folder's path on this node: its own if it is local, else a temporary copy."""
        if self.is_local:
            yield self.root
            return
        local = tempfile.mkdtemp(prefix="raytrain_adv_")
        try:
            self.download(local)
            yield local
        finally:
            shutil.rmtree(local, ignore_errors=True)
