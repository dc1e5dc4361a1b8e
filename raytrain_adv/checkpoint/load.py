"""Reads a checkpoint's files without running what is in them: DCP's own reader unpickles."""

import io
import pathlib
import pickle
from collections import OrderedDict
from dataclasses import replace
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.futures import Future

from raytrain_adv.errors import RaytrainAdvError, StorageError
from raytrain_adv.text import first_line, of_error

METADATA = ".metadata"
_CLASSES: tuple[Any, ...] = (
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata.TensorProperties,
    metadata.TensorStorageMetadata,
    metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
    filesystem._StoragePrefix,
    torch.Size,
    torch.serialization._get_layout,
    pathlib.Path,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    OrderedDict,
    set,
)
_DTYPES = {str(v): v for v in vars(torch).values() if isinstance(v, torch.dtype)}
ALLOWED: dict[str, Any] = {f"{c.__module__}.{c.__qualname__}": c for c in _CLASSES} | _DTYPES
"""The classes in a checkpoint's metadata, by name in the pickle (torch 2.11 to 2.13)."""

# What else pickle raises where bytes mean nothing to it, by its documentation.
_OF_GARBAGE = (AttributeError, EOFError, ImportError, IndexError, TypeError, ValueError)


def read_state(state: dict[str, Any], folder: str, shown: str) -> None:
    """Read a checkpoint's part of a nested state into that state; `shown` names it in errors.
    Raises StorageError when a file cannot be read, or would run code.
    """
    try:
        load_state(state, storage_reader=PlainReader(folder), planner=PlainPlanner())
    except CheckpointException as error:
        # It has every rank's; DCP makes no ordinary exception of it (torch 2.13, api.py).
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, RaytrainAdvError):
            raise cause from None
        found = f"{shown}: {of_error(cause)}"
        fix = "resume from the one before: resume_from_checkpoint: .../step_N"
        raise StorageError("The checkpoint cannot be read", found, fix) from error


class PlainReader(FileSystemReader):
    """DCP's reader for data only; reads metadata first: DCP hides later errors as missing."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self._metadata = _metadata(pathlib.Path(folder) / METADATA)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the checkpoint's metadata."""
        meta = self._metadata.storage_meta or StorageMeta()
        meta.load_id = self.load_id
        return replace(self._metadata, storage_meta=meta)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read this rank's part of the plan; a StorageError if a shard is more than data."""
        try:
            return super().read_data(plan, planner)
        except pickle.UnpicklingError as error:
            raise _refused(pathlib.Path(self.path), first_line(error)) from error


class PlainPlanner(DefaultLoadPlanner):
    """DCP's planner, for values that are data only: it would unpickle whatever they are."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load a value that is not a tensor; an error of the reader if it is more than data."""
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


class _Unpickler(pickle.Unpickler):
    """Creates objects of the classes in ALLOWED only."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._path = pathlib.Path(file.name)

    def find_class(self, module: str, name: str) -> Any:
        found = ALLOWED.get(f"{module}.{name}")
        if found is None:
            raise _refused(self._path, f"{module}.{name}")
        return found


def _metadata(path: pathlib.Path) -> Metadata:
    with path.open("rb") as file:
        try:
            found = _Unpickler(file).load()
        except (pickle.UnpicklingError, MemoryError, *_OF_GARBAGE) as error:
            raise _damaged(path, of_error(error)) from error
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
        raise _damaged(path, "it is not DCP metadata")
    for info in found.storage_data.values():
        file_name = getattr(info, "relative_path", None)  # unpickled: it may lack any attribute
        if not isinstance(file_name, str):
            raise _damaged(path, "it names no file for a tensor")
        if pathlib.PurePath(file_name).name != file_name:
            raise _refused(path, f"the file {file_name}, which is in another folder")
    return found


def _refused(path: pathlib.Path, wanted: str) -> StorageError:
    return StorageError(
        "The checkpoint contains more than data and was not read: it could run code",
        f"{path}: {wanted}",
        "raytrain_adv did not write it, or someone changed it: find out who can write there, "
        "and resume from a checkpoint whose origin you know",
    )


def _damaged(path: pathlib.Path, reason: object) -> StorageError:
    return StorageError(
        "The checkpoint cannot be read",
        f"{path}: {reason}",
        "it is damaged: resume from the one before, resume_from_checkpoint: .../step_N",
    )
