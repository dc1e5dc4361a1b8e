"""A folder that appears whole or not at all, and tensor files that are written as tensors come."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from raytrain_adv.dtensor import raise_alike, rank
from raytrain_adv.errors import RaytrainAdvError, StorageError
from raytrain_adv.storage.atomic import replace_folder
from raytrain_adv.storage.storage import free_space
from raytrain_adv.text import GIB

MAX_FILE_BYTES = 5_000_000_000
"""Size at which a new safetensors file is begun."""
RESUME = (
    "free space or change output_dir, then start the job again with resume_from_checkpoint: true"
)


class NewFolder:
    """Rank 0's work on a folder, written under another name and renamed when complete.

    The first failure is kept: the ranks continue with their collectives, and `publish` raises it on
    all of them. `way_out` is what a user can do when the folder cannot be written.
    """

    def __init__(self, path: Path, device: torch.device, way_out: str = RESUME) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.partial")
        self.device = device
        self.way_out = way_out
        self.writes = rank() == 0
        self.failure: RaytrainAdvError | None = None
        self.run(self._start)

    def _start(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def run(self, action: Callable[[], None]) -> None:
        """Run an action on rank 0, unless an earlier one failed."""
        if not self.writes or self.failure is not None:
            return
        try:
            action()
        except RaytrainAdvError as error:
            self.failure = error
        except Exception as error:  # noqa: BLE001 # tokenizers and configs raise anything where a
            # disk is full, and the other ranks wait for this one: `publish` raises it on all.
            found = f"{type(error).__name__}: {error}\n{free_space(self.path)}"
            what, fix = f"{self.path} could not be written", self.way_out
            if not isinstance(error, OSError):
                fix = f"if the disk has room, report it with this job; if not, {fix}"
            self.failure = StorageError(what, found, fix)
            self.failure.__cause__ = error

    def require(self, size: int) -> None:
        """Fail early, on rank 0, when the disk has less than `size` bytes to spare."""
        self.run(lambda: self.require_now(size))

    def require_now(self, size: int) -> None:
        """Fail with a StorageError when the disk lacks space; called within an action."""
        free = shutil.disk_usage(self.partial).free
        if free < size:
            raise StorageError(
                f"{self.path} needs {size / GIB:.1f} GiB of disk space",
                free_space(self.path),
                self.way_out,
            )

    def publish(self) -> None:
        """Give the folder its name, on rank 0, and let every rank know whether all went well.
        Raises StorageError on every rank, when writing failed; nothing is left under the name.
        """
        self.run(lambda: replace_folder(self.partial, self.path))
        if self.failure is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
        raise_alike(self.failure, self.device)


def folder_gib(path: Path) -> float:
    """Return the size on disk of a folder's files, in GiB."""
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file()) / GIB


def write_json(value: Mapping[str, Any], path: Path) -> None:
    """Write a file as transformers writes its configs."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def save_tensors(
    tensors: dict[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with the usual permissions; safetensors makes it owner-only. What
    has two names (tied tables) is written under both, which safetensors refuses of one memory.
    """
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(tensor.untyped_storage().data_ptr(), name)
    own = {*first.values()}
    apart = {name: tensor if name in own else tensor.clone() for name, tensor in tensors.items()}
    save_file(apart, path, metadata={**(metadata or {}), "format": "pt"})
    if metadata:
        _sort_metadata(path)
    ordinary = path.with_name(f".{path.name}.mode")
    ordinary.touch()
    path.chmod(ordinary.stat().st_mode & 0o777)
    ordinary.unlink()


def _sort_metadata(path: Path) -> None:
    """Put a safetensors file's metadata in order: safetensors writes it in a random one, and what
    is trained alike is to be stored alike, byte for byte.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # one that does not fit is left: the order is no fault to a reader
            file.seek(8)
            file.write(text.ljust(size))


class TensorFiles:
    """model.safetensors, or numbered shards with an index if it would be too large."""

    def __init__(
        self, folder: Path, max_file_bytes: int, metadata: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.metadata = metadata
        self.max_file_bytes = max_file_bytes
        self.pending: dict[str, torch.Tensor] = {}
        self.pending_bytes = 0
        self.files: list[list[str]] = []
        """The names in each file written so far."""
        self.total_bytes = 0
        self.total_parameters = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor in host memory; it may be written at once or with later ones."""
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.pending_bytes + size > self.max_file_bytes:
            self._write()
        self.pending[name] = tensor.contiguous()
        self.pending_bytes += size
        self.total_bytes += size
        self.total_parameters += tensor.numel()

    def _write(self) -> None:
        save_tensors(self.pending, self._shard(len(self.files)), self.metadata)
        self.files.append(list(self.pending))
        self.pending, self.pending_bytes = {}, 0

    def _shard(self, number: int) -> Path:
        return self.folder / f"shard-{number}.safetensors"

    def close(self) -> None:
        """Write what is left, number the files, and write their index if there are several."""
        self._write()
        if len(self.files) == 1:
            os.rename(self._shard(0), self.folder / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self.files):
            file = f"model-{number + 1:05}-of-{len(self.files):05}.safetensors"
            os.rename(self._shard(number), self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        sizes = {"total_parameters": self.total_parameters, "total_size": self.total_bytes}
        index = {"metadata": sizes, "weight_map": weight_map}
        write_json(index, self.folder / "model.safetensors.index.json")
