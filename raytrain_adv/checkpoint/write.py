"""Writes a checkpoint's files in threads, and sums their bytes up on the way to the disk."""

import io
import os
import queue
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from raytrain_adv.checkpoint.staging import num_threads, tensors_of
from raytrain_adv.dtensor import local_part

PIECE = 2**20  # bytes summed up and written while a core's cache holds them
FLUSHED = 32 * 2**20  # bytes after which the disk is made to begin: it would idle until the end
SMALLEST_FILE = 64 * 2**20  # bytes for which another file and thread pay


class Writer(FileSystemWriter):
    """DCP's writer with a file for each thread; `crc32` has name -> checksum of what was written.

    torch's own threads lose their errors, and with them tensors: a full disk would leave a
    checkpoint that looks whole (torch 2.11 to 2.13, filesystem.py). Remove `_write_data` when they
    raise.
    """

    def __init__(self, folder: str, state: dict[str, Any]) -> None:
        sizes = [local_part(tensor).nbytes for _, tensor in tensors_of(state)]
        files = max(1, min(num_threads(), sum(sizes) // SMALLEST_FILE, len(sizes)))
        super().__init__(folder, thread_count=files, per_thread_copy_ahead=0)  # copies are there
        self.fs: _Files = _Files()
        self.crc32 = self.fs.crc32

    def _write_data(
        self, planner: SavePlanner, file_queue: queue.Queue[Any]
    ) -> Future[list[WriteResult]]:
        files, self.thread_count = file_queue.qsize(), 1  # each call here is a thread
        write = super()._write_data
        with ThreadPoolExecutor(files, "checkpoint_file") as pool:
            parts = [pool.submit(write, planner, file_queue) for _ in range(files)]
        done: Future[list[WriteResult]] = Future()
        done.set_result([one for part in parts for one in part.result().wait()])
        return done


class _Files(FileSystem):
    def __init__(self) -> None:
        self.crc32: dict[str, int] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with _Summed(path, mode) as stream:
            try:
                yield stream
            except RuntimeError as error:  # of torch's zip writer, which loses the disk's
                raise stream.failure or error from None
        self.crc32[Path(path).name] = stream.crc32

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.crc32[Path(new_path).name] = self.crc32.pop(Path(path).name)


class _Summed(io.FileIO):
    """A file that knows the CRC-32 of what was written into it."""

    crc32 = 0
    waiting = 0  # bytes that the disk was not told to write
    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._write(data)
        except OSError as error:
            self.failure = error
            raise

    def _write(self, data: Any) -> int:
        whole = memoryview(data).cast("B")
        for start in range(0, len(whole), PIECE):
            piece = whole[start : start + PIECE]
            self.crc32 = zlib.crc32(piece, self.crc32)
            while piece:
                written = cast(int, super().write(piece))
                piece, self.waiting = piece[written:], self.waiting + written
            if self.waiting >= FLUSHED:
                os.fdatasync(self.fileno())
                self.waiting = 0
        return len(whole)
