"""FSDP2's collectives within a host by copies between its GPUs, without NCCL's kernels.

NCCL's kernels take multiprocessors from the matrix products that they overlap with. Here the copy
engines move the bytes: between two barriers each rank reads its peers' buffers. Gradients travel in
the dtype of backward and are summed in float32, rank after rank, as NCCL sums float32 copies of
them, for half the bytes.

Source: _low_contention_all_gather in torch/distributed/_symmetric_memory.
"""

import math
import os
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from raytrain_adv.text import GIB

BLOCK = 4096
GATHERED_BUFFERS = 2  # FSDP2 gathers one unit ahead of the one that computes
_pools: "WeakSet[Pool]" = WeakSet()


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def _sum_of_ranks(  # type: ignore[no-untyped-def] # its arguments are not Python values
    own,
    received,
    out,
    count,
    rank,
    factor,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    total = tl.zeros((BLOCK,), tl.float32)
    for other in tl.static_range(RANKS):
        if other == rank:
            part = tl.load(own + offsets, mask=mask)
        else:
            place = other - (other > rank)
            part = tl.load(received + place.to(tl.int64) * count + offsets, mask=mask)
        total += part.to(tl.float32)
    tl.store(out + offsets, (total * factor).to(out.dtype.element_ty), mask=mask)


class Pool:
    """Buffers of one size that the peers can read. All ranks take them in the same order.

    They lie outside of torch's allocator: torch.cuda.max_memory_allocated does not count them. A
    peer that does not come to a barrier within `timeout_s` ends this process with a CUDA error.
    """

    def __init__(self, group: dist.ProcessGroup, length: int, timeout_s: int) -> None:
        self.group, self.length, self.num_bytes, self.turn = group, length, 0, 0
        self.timeout_ms = 1000 * timeout_s
        self.buffers: list[tuple[Tensor, Any]] = []
        _pools.add(self)

    def take(self, num_bytes: int, device: torch.device) -> tuple[Tensor, Any]:
        """Return the next buffer, of at least that many bytes, and its handle."""
        if num_bytes > self.num_bytes:
            torch.cuda.synchronize(device)  # until all ranks have read the smaller ones
            dist.barrier(self.group, device_ids=[device.index])
            self.buffers.clear()
            self.num_bytes, self.turn = num_bytes, 0
        if self.turn == len(self.buffers):
            made = symm_mem.empty(self.num_bytes, dtype=torch.uint8, device=device)
            # The flags of its barriers are cleared on the default stream, and a peer must not set
            # them before.
            torch.cuda.synchronize(device)
            self.buffers.append((made, symm_mem.rendezvous(made, self.group.group_name)))
        found = self.buffers[self.turn]
        self.turn = (self.turn + 1) % self.length
        return found


def pools(group: dist.ProcessGroup, timeout_s: int) -> tuple[Pool, Pool]:
    """Return buffers for gathering and for reducing, as many as FSDP2 uses at a time."""
    return Pool(group, GATHERED_BUFFERS, timeout_s), Pool(group, 1, timeout_s)


def held_gib() -> float:
    """Return this process's GPU memory in buffers, in GiB."""
    return sum(pool.num_bytes * len(pool.buffers) for pool in _pools) / GIB


class PeerAllGather(AllGather):
    """Every rank's shards, copied from the peers' buffers."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.handles: dict[int, Any] = {}

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return a buffer for all ranks' shards; FSDP2 writes this rank's."""
        num_bytes = math.prod(map(int, size)) * dtype.itemsize
        buffer, handle = self.pool.take(num_bytes, device)
        self.handles[buffer.data_ptr()] = handle
        return buffer[:num_bytes].view(dtype)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> None:
        """Fill the peers' parts of the buffer, on the current stream."""
        handle, count = self.handles[output_tensor.data_ptr()], input_tensor.numel()
        handle.barrier(timeout_ms=self.pool.timeout_ms)
        for peer in _peers(handle):
            theirs = handle.get_buffer(peer, (count,), output_tensor.dtype, peer * count)
            output_tensor[peer * count : (peer + 1) * count].copy_(theirs)
        handle.barrier(timeout_ms=self.pool.timeout_ms)


class PeerReduceScatter(ReduceScatter):
    """The ranks' gradients, sent in the dtype `sent` and summed in float32.

    FSDP2 allocates the input, then the output, then calls.
    """

    def __init__(self, pool: Pool, sent: torch.dtype) -> None:
        self.pool, self.sent = pool, sent
        self.handle: Any = None

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return the buffer that the peers read, or a tensor for the sum."""
        if self.handle is not None:
            return torch.empty(*size, dtype=dtype, device=device)
        num_bytes = math.prod(map(int, size)) * self.sent.itemsize
        buffer, self.handle = self.pool.take(num_bytes, device)
        return buffer[:num_bytes].view(self.sent)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Write this rank's part of the sum over ranks, or of their mean, on the current stream."""
        handle, self.handle = self.handle, None
        rank, world, count = handle.rank, handle.world_size, output_tensor.numel()
        received = input_tensor.new_empty(world - 1, count)
        handle.barrier(timeout_ms=self.pool.timeout_ms)
        for peer in _peers(handle):
            theirs = handle.get_buffer(peer, (count,), self.sent, rank * count)
            received[peer - (peer > rank)].copy_(theirs)
        handle.barrier(timeout_ms=self.pool.timeout_ms)
        _sum_of_ranks[(triton.cdiv(count, BLOCK),)](
            input_tensor[rank * count : (rank + 1) * count],
            received,
            output_tensor,
            count,
            rank,
            1 / world if op == dist.ReduceOp.AVG else 1.0,
            RANKS=world,
            BLOCK=BLOCK,
            num_warps=8,
        )


def _peers(handle: Any) -> list[int]:
    """Return the other ranks; each rank begins with another one, so that links are shared."""
    return [(handle.rank + step) % handle.world_size for step in range(1, handle.world_size)]


@torch.no_grad()
def check(group: dist.ProcessGroup, device: torch.device, timeout_s: int) -> None:
    """Compare both collectives with NCCL's, to the bit, on random numbers. Raises ValueError when
    they differ, and RuntimeError when peers cannot read each other's memory.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    numbers = torch.Generator(device).manual_seed(rank)
    count = 100_003
    mine = torch.randn(world * count, generator=numbers, device=device).bfloat16()
    gathers, reductions = pools(group, timeout_s)
    gathering = PeerAllGather(gathers)
    whole = gathering.allocate((world * count,), dtype=mine.dtype, device=device)
    own = whole[rank * count : (rank + 1) * count]
    own.copy_(mine[:count])
    gathering(whole, own, group)
    expected = torch.empty_like(whole)
    dist.all_gather_into_tensor(expected, mine[:count].contiguous(), group=group)
    if not torch.equal(whole, expected):
        raise ValueError("an all-gather gave other numbers than NCCL's")
    summing = PeerReduceScatter(reductions, mine.dtype)
    summing.allocate((world * count,), dtype=torch.float32, device=device).copy_(mine)
    sent = reductions.buffers[0][0][: 2 * mine.numel()].view(mine.dtype)
    mean = summing.allocate((count,), dtype=torch.float32, device=device)
    summing(mean, sent, group, dist.ReduceOp.AVG)
    everyone = mine.new_empty(world * mine.numel())
    dist.all_gather_into_tensor(everyone, mine, group=group)
    parts = everyone.view(world, world, count)[:, rank].float()
    total = torch.zeros_like(mean)
    for part in parts:
        total += part
    if not torch.equal(mean, total * (1 / world)):
        raise ValueError("a reduce-scatter gave other numbers than a sum in float32")


def readable(device: torch.device, others: Sequence[int]) -> bool:
    """Whether this GPU can read the memory of those of the host with these numbers."""
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # not used here
    return all(
        torch.cuda.can_device_access_peer(device, other)
        for other in others
        if other != device.index
    )
