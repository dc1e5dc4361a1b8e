"""Host memory that checkpoints are copied to: taken once, and page-locked, so that a GPU writes to
it at the bus's full speed.

Copies to memory that is new each time wait for its pages, and are made in pieces: a GPU that has to
wait for 45 GiB stands still for many steps.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from raytrain_adv.dtensor import local_part

GIB = 2**30
LARGEST_SHARE = 0.5
"""Of the memory that is free on the node, for all its workers."""
MOST_THREADS = 8
SMALLEST = 2**20
"""Bytes of a tensor for which locking pays."""
PAGE = os.sysconf("SC_PAGE_SIZE")
Copies = dict[str, torch.Tensor]


class HostMemory:
    """A copy in host memory for each tensor of a state, by its path.

    Args:
        say: takes a sentence for the user.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.copies: Copies = {}
        self.locked: list[torch.Tensor] = []
        """Bytes, whole pages."""
        self.refused = False
        """Whether some could not be had; said once."""
        self.pool: ThreadPoolExecutor | None = None
        self.coming: dict[str, Future[torch.Tensor]] = {}

    @property
    def is_prepared(self) -> bool:
        """Whether prepare has been called."""
        return self.pool is not None

    def prepare(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Begin to take memory for those on a GPU, in threads; `of` waits for it."""
        wanted = {path: tensor for path, tensor in tensors if tensor.device.type == "cuda"}
        workers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        size = sum(local_part(t).numel() * t.element_size() for t in wanted.values())
        threads = max(1, min(MOST_THREADS, (os.cpu_count() or 1) // workers))
        # The current GPU is a thread's own: without it each would open another on the first GPU.
        devices = {tensor.device for tensor in wanted.values()}

        def begin() -> None:
            for device in devices:
                torch.cuda.set_device(device)

        self.pool = ThreadPoolExecutor(threads, "host_memory", begin)
        free = available_bytes()
        if size * workers > LARGEST_SHARE * free:
            self.say(
                f"checkpoints are copied to host memory that is not page-locked, for which steps "
                f"wait longer: {size * workers / GIB:.1f} GiB on this node would be more than half "
                f"of the {free / GIB:.1f} GiB that are free"
            )
            return
        for path, tensor in wanted.items():
            self.coming[path] = self.pool.submit(self._taken, tensor)

    def _taken(self, tensor: torch.Tensor) -> torch.Tensor:
        local = local_part(tensor)
        if local.nbytes < SMALLEST:
            return torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
        pages = torch.empty(local.nbytes + 2 * PAGE, dtype=torch.uint8)
        start = -pages.data_ptr() % PAGE  # no page of it is another's, which may be locked too
        whole = pages[start : start + -(-local.nbytes // PAGE) * PAGE]
        whole.zero_()  # has the pages made here, and not while the GPU waits
        cuda: Any = torch.cuda
        status = int(cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.nbytes, 0))
        if status == 0:
            self.locked.append(whole)
        else:
            self._say_once(f"CUDA error {status}; ulimit -l may be too low")
        copy = whole[: local.nbytes].view(local.dtype).view(local.shape)
        if not isinstance(tensor, DTensor):
            return copy
        # DTensor.from_local would move it to the device of the mesh.
        sharded: Any = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
        sharded._local_tensor = copy
        held: torch.Tensor = sharded
        return held

    def _say_once(self, reason: str) -> None:
        if not self.refused:
            self.refused = True
            self.say(
                f"host memory for checkpoints was not page-locked, so that steps wait longer for "
                f"them: {reason}"
            )

    def of(self, path: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the memory for a tensor; new and not page-locked where none was taken for it."""
        if path in self.coming:
            try:
                self.copies[path] = self.coming.pop(path).result()
            except RuntimeError as error:  # PyTorch's, where the node has no more memory
                self._say_once(str(error).splitlines()[0])
        known = self.copies.get(path)
        if known is not None and known.shape == tensor.shape and known.dtype == tensor.dtype:
            return known
        return torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)

    def stop(self) -> None:
        """Take no more."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def release(self) -> None:
        """Give the memory back."""
        self.stop()
        cuda: Any = torch.cuda
        for pages in self.locked:
            cuda.cudart().cudaHostUnregister(pages.data_ptr())
        self.locked.clear()
        self.copies.clear()
        self.coming.clear()


def available_bytes() -> int:
    """Return the host memory that is free for new use, also under a container's limit.

    Source: man 5 proc, MemAvailable; the kernel's cgroup-v2 documentation, memory.max.
    """
    lines = Path("/proc/meminfo")
    if not lines.is_file():  # not Linux
        return 2**62
    found = {line.split(":")[0]: line.split()[1] for line in lines.read_text().splitlines()}
    free = int(found["MemAvailable"]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    if limit.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()) + _cached(limit.parent))
    return free


def _cached(group: Path) -> int:
    """Return the bytes of files that a control group's use counts and the kernel gives back."""
    lines = (group / "memory.stat").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
