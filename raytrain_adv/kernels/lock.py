"""The lock file: the files of a job's kernels, by hash, and their folders."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from raytrain_adv.errors import JobError, StorageError
from raytrain_adv.kernels.source import Wanted
from raytrain_adv.storage.atomic import write_atomic

FILE_NAME = "kernels.lock.json"
FOLDER = "kernels"  # folder of the files, next to the lock file


def _inside(path: str) -> str:
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError(f"{path} leads out of the folder")
    return path


Use = Literal["layers", "attention"]
Inside = Annotated[str, AfterValidator(_inside)]
"""A relative path without "..": files are written to the paths in a lock file."""


class Locked(BaseModel):
    """One kernel, pinned."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    asked: str
    """As the job wrote it, as kernels-community/activation@v1."""
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None
    """Commit on the Hub; null for a folder."""
    variant: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    """The build, as torch-cuda."""
    files: dict[Inside, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]
    """Path in the build -> sha256."""
    folder: Inside | None = None
    """Folder of the build, relative to the lock file's; null if it was not fetched."""
    trust: str = ""
    """Why its publisher was trusted."""
    use: Use = "layers"
    """What it computes: modules (kernel_name), or attention (flash_attn)."""

    @property
    def digest(self) -> str:
        """One hash of all files."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()

    @property
    def at(self) -> str:
        """Commit, or hash of the files of a folder, shortened."""
        return (self.commit or self.digest)[:7]


class Lock(BaseModel):
    """A lock file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    kernels: tuple[Locked, ...]

    def of(self, wanted: Wanted) -> Locked | None:
        """Return a kernel's entry; None if there is none, or only another revision's."""
        for locked in (one for one in self.kernels if one.source == wanted.source):
            is_same = wanted.asked in (locked.asked, locked.source)
            if is_same if wanted.commit is None else wanted.commit == locked.commit:
                return locked
        return None


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file of a build, except those that Python compiles on import."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and "__pycache__" not in p.parts)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def differences(locked: Locked, folder: Path) -> list[str]:
    """Return a line for each file that differs from the lock."""
    found = digests(folder) if folder.is_dir() else {}
    lines = {name: f"{name} is missing" for name in locked.files.keys() - found.keys()}
    for name, digest in found.items():
        due = locked.files.get(name)
        if due is None:
            lines[name] = f"{name} is not in the lock"
        elif due != digest:
            lines[name] = f"{name}: sha256 {digest[:12]}, locked {due[:12]}"
    return [lines[name] for name in sorted(lines)]


def require_same(locked: Locked, folder: Path, lock_file: Path) -> None:
    """Refuse a build whose files differ from the lock. Raises JobError naming the files."""
    if lines := differences(locked, folder):
        raise JobError(
            f"the files of {locked.source} are not those in {lock_file}",
            "\n".join([str(folder), *lines[:6]] + (["..."] if len(lines) > 6 else [])),
            "restore the locked files (raytrain-adv kernels fetch), or make a new lock if the "
            "change is intended (raytrain-adv kernels lock)",
        )


def read(file: Path) -> Lock:
    """Read a lock file. Raises JobError when it is missing or not a lock file."""
    try:
        return Lock.model_validate_json(file.read_bytes())
    except OSError as error:
        raise JobError(
            "there is no lock file to read",
            f"{file}: {error.strerror or error}",
            f"make it with raytrain-adv kernels lock job.yaml --output {file}",
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise JobError(
            f"{file} is not a lock file of this version",
            f"{where}: {first['msg']}",
            f"make it again with raytrain-adv kernels lock job.yaml --output {file}; one that a "
            "run left in its output_dir may be deleted",
        ) from None


def write(kernels: Iterable[Locked], file: Path) -> None:
    """Write a lock file atomically. Raises StorageError when it cannot be written."""
    try:
        write_atomic(file, Lock(kernels=tuple(kernels)).model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise StorageError(
            "The lock file cannot be written",
            f"{file}: {error.strerror or error}",
            "name a file in a folder that you can write to",
        ) from None
