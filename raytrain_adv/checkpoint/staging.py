"""What goes into a checkpoint: copies of plain tensors in host memory, out of training's way.

torchao's 8-bit optimizer states are written as float32, which any number of workers can read, also
without torchao. The same number of workers restores every code and scale; with another number,
blocks begin elsewhere and some values move by a rounding.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from raytrain_adv.dtensor import local_part
from raytrain_adv.hardware import free_host_memory
from raytrain_adv.ops.adamw_8bit import fill_8bit, values_of
from raytrain_adv.ops.pages import locked_pages, unlock
from raytrain_adv.text import GIB, first_line

LARGEST_SHARE = 0.5  # of the memory that is free on the node, for all its workers
MOST_THREADS = 8
SMALLEST = 2**20  # bytes of a tensor for which locking pays


class HostMemory:
    """A copy in host memory for each tensor of a state, by its path."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.copies: dict[str, torch.Tensor] = {}
        self.locked: list[torch.Tensor] = []  # bytes, whole pages
        self.refused = False  # whether some could not be taken; reported once
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
        # The current GPU is a thread's own: without it each would open another on the first GPU.
        devices = {tensor.device for tensor in wanted.values()}

        def begin() -> None:
            for device in devices:
                torch.cuda.set_device(device)

        self.pool = ThreadPoolExecutor(num_threads(), "host_memory", begin)
        free = free_host_memory()
        if size * workers > LARGEST_SHARE * free:
            self.say(
                f"checkpoints are copied to host memory that is not page-locked, so that steps "
                f"wait longer: {size * workers / GIB:.1f} GiB on this node would be more than half "
                f"of the {free / GIB:.1f} GiB that are free"
            )
            return
        self.coming = {path: self.pool.submit(self._taken, t) for path, t in wanted.items()}

    def _taken(self, tensor: torch.Tensor) -> torch.Tensor:
        local = local_part(tensor)
        if local.nbytes < SMALLEST:
            return _empty_on_host(tensor)
        whole, status = locked_pages(local.nbytes)
        if status == 0:
            self.locked.append(whole)
        else:
            self._report_once(f"CUDA error {status}; ulimit -l may be too low")
        # Of its own extent: DCP would copy a part of something larger once more.
        flat = torch.frombuffer(whole.numpy(), dtype=local.dtype, count=local.numel())
        copy = flat.view(local.shape)
        if not isinstance(tensor, DTensor):
            return copy
        # DTensor.from_local would move it to the device of the mesh.
        sharded = _empty_on_host(tensor)
        sharded._local_tensor = copy  # type: ignore[attr-defined]
        return sharded

    def _report_once(self, reason: str) -> None:
        if not self.refused:
            self.refused = True
            text = "host memory for checkpoints was not page-locked, so that steps wait longer"
            self.say(f"{text} for them: {reason}")

    def of(self, path: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the memory for a tensor; new and not page-locked where none was taken for it."""
        if path in self.coming:
            try:
                self.copies[path] = self.coming.pop(path).result()
            except RuntimeError as error:  # PyTorch's, where the node has no more memory
                self._report_once(first_line(error))
        known = self.copies.get(path)
        if known is not None and known.shape == tensor.shape and known.dtype == tensor.dtype:
            return known
        return _empty_on_host(tensor)

    def stop(self) -> None:
        """Take no more."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def release(self) -> None:
        """Give the memory back."""
        self.stop()
        for pages in self.locked:
            unlock(pages)
        self.locked.clear()
        self.copies.clear()
        self.coming.clear()


def num_threads() -> int:
    """Return the threads that this worker may use for checkpoints, of its node's cores."""
    workers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_THREADS, (os.cpu_count() or 1) // workers))


def _empty_on_host(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)


@torch.no_grad()
def stage(state: Any, memory: HostMemory) -> Any:
    """Return the state with every tensor copied to host memory, which the next call overwrites."""
    copies = _mapped(state, lambda path, tensor: _host_copy(path, _plain(tensor), memory))
    for device in {tensor.device for _, tensor in tensors_of(state) if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return copies


def plain_like(state: Any) -> Any:
    """Return the nested state for reading a checkpoint: its own tensors, 8-bit ones as float32."""
    return _mapped(state, lambda _, tensor: _plain(tensor))


def tensors_of(state: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield path and tensor of the state; without 8-bit tensors, which are saved as float32."""
    return ((path, t.detach()) for path, t in _walk(state) if not _is_8bit(t))


@torch.no_grad()
def restore_8bit(state: Any, plain: Any) -> bool:
    """Copy float32 values that were read into the state's 8-bit tensors; return whether any are."""
    values = dict(_walk(plain))
    packed = {path: tensor for path, tensor in _walk(state) if _is_8bit(tensor)}
    for path, tensor in packed.items():
        fill_8bit(local_part(tensor), local_part(values[path]))
    return bool(packed)


def _walk(state: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(state, torch.Tensor):
        yield path, state
    elif isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from _walk(value, f"{path}/{key}")


def _mapped(state: Any, change: Callable[[str, torch.Tensor], torch.Tensor], path: str = "") -> Any:
    if isinstance(state, dict):
        return {key: _mapped(value, change, f"{path}/{key}") for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [_mapped(value, change, f"{path}/{n}") for n, value in enumerate(state)]
    return change(path, state) if isinstance(state, torch.Tensor) else state


def _is_8bit(tensor: torch.Tensor) -> bool:
    # By name: importing torchao takes a second that other jobs need not spend.
    return type(local_part(tensor)).__name__ == "OptimState8bit"


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    if not _is_8bit(tensor):
        return tensor.detach()
    values = values_of(local_part(tensor))
    if not isinstance(tensor, DTensor):
        return values
    where: dict[str, Any] = {"shape": tensor.shape, "stride": tensor.stride(), "run_check": False}
    whole = DTensor.from_local(values, tensor.device_mesh, tensor.placements, **where)
    return whole.to(values.device)


def _host_copy(path: str, tensor: torch.Tensor, memory: HostMemory) -> torch.Tensor:
    if tensor.device.type == "cpu":
        return tensor.clone()
    copy = memory.of(path, tensor)
    local_part(copy).copy_(local_part(tensor), non_blocking=True)
    return copy
