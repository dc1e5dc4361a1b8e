"""A model's safetensors files: where they are, what they hold, and reading a region of a tensor.

Weights that the files hold rounded, in 8 bits or fewer, are read as their values.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open

from raytrain_adv.config import JobConfig
from raytrain_adv.dtensor import Region
from raytrain_adv.errors import JobError
from raytrain_adv.model.config_file import unreadable
from raytrain_adv.model.files import WITH_WEIGHTS, is_local, model_source
from raytrain_adv.model.vocabulary import NewRows
from raytrain_adv.ops.stored import formats
from raytrain_adv.text import parse_json

INDEX = "model.safetensors.index.json"
LONGEST_NAME = 255  # bytes, of a file on Linux
COPY_AGAIN = "copy or download the model folder again"


def model_folder(job: JobConfig) -> Path:
    """Return the folder of the model's files; a Hub model is downloaded once per node. Raises
    JobError when the Hub has no such model, refuses it, or cannot be reached.
    """
    if is_local(job):
        return Path(model_source(job))
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    name = job.model.model_name_or_path
    cache = Path(job.model.cache_dir or HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(cache / f".{name.replace('/', '--')}.lock"):
            folder = snapshot_download(
                name,
                revision=job.model.model_revision,
                cache_dir=cache,
                allow_patterns=["*.safetensors", "*.json"],
            )
    except (OSError, ValueError) as error:
        raise unreadable(job, error) from error
    return Path(folder)


class CheckpointFiles:
    """The tensors of a model folder by name, opened but not read. Use as a context manager. Raises
    JobError when files are missing or damaged.
    """

    def __init__(self, folder: Path, new_rows: NewRows | None = None) -> None:
        self.folder = folder
        self.new_rows = new_rows
        """How rows are filled that the model has and the files lack; none refuses them."""
        self._instead: dict[str, Callable[[Region | None], torch.Tensor]] = {}
        self.bytes_read = 0
        """Bytes of tensor data this process has read so far."""
        self._open = ExitStack()
        self._handles: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Name -> shape of every tensor, and of every weight that is stored rounded."""
        self._integers: set[str] = set()  # names of tensors of integers
        for file, names in tensor_files(folder).items():
            self._open_file(file, names)
        self._held = self.shapes
        config = read_json(folder / "config.json")
        try:
            self._stored = formats.find(config, self._held, self.read_stored)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            found = f"{type(error).__name__}: {error}"
            what = f"{folder}: the weights are not stored as config.json states"
            raise JobError(what, found, COPY_AGAIN) from error
        if self._stored:
            self.shapes = formats.logical(self._stored, self._held)

    def _open_file(self, file: Path, names: list[str]) -> None:
        try:
            handle = self._open.enter_context(safe_open(file, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise JobError(f"{file} cannot be read", str(error), COPY_AGAIN) from error
        held = set(handle.keys())
        absent = sorted(set(names) - held)
        if absent:
            raise JobError(
                f"{file} does not hold the tensors that {INDEX} lists",
                f"{len(absent)} tensors are missing, the first is {absent[0]}",
                COPY_AGAIN,
            )
        for name in held:
            self._handles[name] = handle
            part = handle.get_slice(name)
            self.shapes[name] = tuple(part.get_shape())
            if part.get_dtype().startswith(("I", "U")):
                self._integers.add(name)

    def holds_integers(self, name: str) -> bool:
        """Return whether a tensor's values are integers, and do not stand for rounded weights."""
        return name in self._integers and name not in self._stored

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """Read a tensor, or the region of it, into host memory: in the file's dtype, or in float32
        what a rounded weight stands for.
        """
        return self._instead.get(name, partial(self._value, name))(region)

    def read_float8(
        self, name: str, rows: slice, across: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Read rows of a weight that is stored in float8 with blocks of `across` columns, and their
        scales [rows, blocks]; none if it is stored otherwise.
        """
        stored = None if name in self._instead else self._stored.get(name)
        if stored is None:
            return None
        return stored.read_float8(self.read_stored, self._held, rows, across)

    def _value(self, name: str, region: Region | None) -> torch.Tensor:
        if name in self._stored:
            return self._stored[name].read(self.read_stored, self._held, region)
        return self.read_stored(name, region)

    def replace(
        self, name: str, shape: tuple[int, ...], read: Callable[[Region | None], torch.Tensor]
    ) -> None:
        """Read a tensor by `read`, which returns a region of it, from now on."""
        self._instead[name] = read
        self.shapes = {**self.shapes, name: shape}

    def add_rows(self, name: str, rows: int) -> None:
        """Read a table with this many rows from now on: those that the files lack are filled."""
        if self.new_rows is None or name in self._instead:
            return
        held, read = self.shapes[name], partial(self._value, name)
        whole = partial(self.new_rows.read, name, held, rows, read)
        self.replace(name, (rows, *held[1:]), whole)

    def read_stored(self, name: str, region: Region | None = None) -> torch.Tensor:
        """Read a tensor of the files, or the region of it, as it is."""
        handle = self._handles[name]
        # Slices of rank-0 tensors are not supported by safetensors.
        tensor: torch.Tensor = handle.get_slice(name)[region] if region else handle.get_tensor(name)
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()


def read_json(path: Path) -> dict[str, Any]:
    """Return a file's JSON object; an empty one if there is no such file. Raises JobError when it
    cannot be read, is no JSON, or holds something else than an object.
    """
    if not path.is_file():
        return {}
    try:
        found = parse_json(path.read_text())
    except (OSError, ValueError) as error:
        raise JobError(f"{path} cannot be read", str(error), COPY_AGAIN) from error
    if not isinstance(found, dict):
        raise JobError(f"{path} cannot be read", f"it holds no object: {found!r:.80}", COPY_AGAIN)
    return found


def _is_name(file: Any) -> bool:
    """Whether this can be the name of a file in a folder: text, no path, not too long."""
    if not isinstance(file, str) or Path(file).name != file or "\0" in file:
        return False
    return len(file.encode("utf-8", "replace")) <= LONGEST_NAME


def tensor_files(folder: Path) -> dict[Path, list[str]]:
    """Return each safetensors file, with the names that an index lists for it. Raises JobError when
    the folder has no weights, or the index names files that are not there.
    """
    index = folder / INDEX
    if not index.is_file():
        if (folder / "model.safetensors").is_file():
            return {folder / "model.safetensors": []}
        raise JobError(
            f"{folder} holds no weights",
            f"neither model.safetensors nor {INDEX}",
            WITH_WEIGHTS,
        )
    weight_map = read_json(index).get("weight_map")
    given: dict[str, Any] = weight_map if isinstance(weight_map, dict) else {"": weight_map}
    # A file elsewhere is not part of the model: an index may come from anyone.
    odd = [f for f in given.values() if not _is_name(f)]
    if odd:
        found = f"weight_map is to name files of the folder, and has {odd[0]!r:.80}"
        raise JobError(f"{index} cannot be read", found, COPY_AGAIN)
    files: dict[Path, list[str]] = {}
    for name, file in given.items():
        files.setdefault(folder / file, []).append(name)
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise JobError(
            f"{folder} lacks files that its index names",
            f"{len(absent)} of {len(files)} are missing: {', '.join(absent[:3])}",
            COPY_AGAIN,
        )
    return files
