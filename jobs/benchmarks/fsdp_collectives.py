"""FSDP2's collectives by NCCL's kernels and by copies between the GPUs of one host: step times.

    python -m torch.distributed.run --nproc_per_node 2 jobs/benchmarks/fsdp_collectives.py \\
        [--only NAME ...] [--out FILE]

An experiment, not a feature yet. NCCL's kernels take multiprocessors from the matrix products that
they overlap with. PeerAllGather and PeerReduceScatter let the copy engines move the bytes instead:
each rank reads its peers' buffers between two barriers. Gradients travel in bf16, as backward
computes them, and are summed in float32. Open: a run of several variants in one process stopped
making progress once; it must be understood before training uses this.

Source: _low_contention_all_gather in torch/distributed/_symmetric_memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
import triton
import triton.language as tl
import whole_steps
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from transformers import PreTrainedModel

from raytrain_adv.config import JobConfig
from raytrain_adv.model import parallel
from raytrain_adv.model.build import decoder_layers
from raytrain_adv.run.run import local_run
from raytrain_adv.transforms.applied import Transforms

FP8 = {"fp8": True}
GATHERED = {**FP8, "fp8_enable_fsdp_float8_all_gather": True}
VARIANTS: dict[str, tuple[set[str], dict[str, Any]]] = {
    "bf16": (set(), {}),
    "bf16, peers": ({"units", "gather", "reduce"}, {}),
    "fp8": (set(), FP8),
    "fp8, units": ({"units"}, FP8),
    "fp8, peers gather": ({"units", "gather"}, FP8),
    "fp8, peers": ({"units", "gather", "reduce"}, FP8),
    "fp8, peers, whole": ({"units", "gather", "reduce", "whole"}, FP8),
    "fp8 all-gather, peers": ({"units", "gather", "reduce"}, GATHERED),
    "fp8, peers, ahead": ({"units", "gather", "reduce", "ahead"}, FP8),
}
"""What differs from the package's sharding, and the job's keys. units: embedding and head are
gathered on their own; gather, reduce: by copies; whole: layers stay gathered until backward."""
BLOCK = 4096


@triton.jit
def _mean_of_ranks(own, peers, out, count, rank, factor, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    total = tl.zeros((BLOCK,), tl.float32)
    for other in tl.static_range(RANKS):
        if other == rank:
            part = tl.load(own + offsets, mask=mask)
        else:
            part = tl.load(peers + other * count + offsets, mask=mask)
        total += part.to(tl.float32)
    tl.store(out + offsets, (total * factor).to(out.dtype.element_ty), mask=mask)


class Ring:
    """Buffers that peers can read, by their size; all ranks take them in the same order."""

    def __init__(self, group: dist.ProcessGroup, length: int) -> None:
        self.group, self.length = group, length
        self.buffers: dict[int, list[tuple[torch.Tensor, Any]]] = {}
        self.turn: dict[int, int] = {}

    def take(self, num_bytes: int, device: torch.device) -> tuple[torch.Tensor, Any]:
        """Return the next buffer of that many bytes, and its handle."""
        buffers = self.buffers.setdefault(num_bytes, [])
        turn = self.turn.get(num_bytes, 0)
        self.turn[num_bytes] = (turn + 1) % self.length
        if turn == len(buffers):
            made = symm_mem.empty(num_bytes, dtype=torch.uint8, device=device)
            torch.cuda.synchronize()  # its flags are zeroed on the default stream
            buffers.append((made, symm_mem.rendezvous(made, self.group.group_name)))
        return buffers[turn]


def pull(handle: Any, count: int, dtype: torch.dtype, offset: Callable[[int], int]) -> Any:
    """Yield each peer's rank and `count` numbers of its buffer, from offset(peer) on."""
    for step in range(1, handle.world_size):
        peer = (handle.rank + step) % handle.world_size
        yield peer, handle.get_buffer(peer, (count,), dtype, offset(peer))


class PeerAllGather(AllGather):
    """FSDP2's all-gather by copies from the peers' buffers."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.handles: dict[int, Any] = {}

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Return a buffer for all ranks' shards; FSDP2 writes this rank's."""
        buffer, handle = self.ring.take(math.prod(map(int, size)) * dtype.itemsize, device)
        self.handles[buffer.data_ptr()] = handle
        return buffer.view(dtype)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: Any = 0
    ) -> None:
        """Fill the peers' parts of the buffer."""
        handle, count = self.handles[output_tensor.data_ptr()], input_tensor.numel()
        handle.barrier()
        for peer, theirs in pull(handle, count, output_tensor.dtype, lambda p: p * count):
            output_tensor[peer * count : (peer + 1) * count].copy_(theirs)
        handle.barrier()


class PeerReduceScatter(ReduceScatter):
    """FSDP2's reduce-scatter: the peers' parts are copied here and averaged in float32."""

    def __init__(self, ring: Ring) -> None:
        self.ring, self.handle = ring, None

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Return the buffer that peers read, then the output: FSDP2 takes them in this order."""
        if self.handle is not None:
            return torch.empty(*size, dtype=dtype, device=device)
        buffer, self.handle = self.ring.take(2 * math.prod(map(int, size)), device)
        return buffer.view(torch.bfloat16)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: Any,
        op: Any,
        async_op: Any = 0,
    ) -> None:
        """Write this rank's part of the mean over ranks."""
        handle, self.handle = self.handle, None
        assert handle is not None
        rank, world, count = handle.rank, handle.world_size, output_tensor.numel()
        received = input_tensor.new_empty(world * count)
        handle.barrier()
        for peer, theirs in pull(handle, count, torch.bfloat16, lambda _: rank * count):
            received[peer * count : (peer + 1) * count].copy_(theirs)
        handle.barrier()
        own = input_tensor[rank * count : (rank + 1) * count]
        grid = (triton.cdiv(count, BLOCK),)
        _mean_of_ranks[grid](own, received, output_tensor, count, rank, 1 / world, world, BLOCK)


def sharded(changes: set[str], model: PreTrainedModel, job: JobConfig, mesh: DeviceMesh) -> None:
    """Shard and compile as the package does, but for the changes."""
    shard = parallel._sharder(job, mesh)
    Transforms(job).before_sharding(model)
    parallel.require_compiled()
    layers = [layer for _, layer in decoder_layers(model)]
    for layer in layers:
        layer.compile(fullgraph=False)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    units: list[nn.Module] = [*layers, *(ends if "units" in changes else ())]
    group = mesh.get_group("shard")
    gathers, reductions = Ring(group, 3 if "ahead" in changes else 2), Ring(group, 1)
    for unit in map(shard, units):
        if "gather" in changes:
            unit.set_custom_all_gather(PeerAllGather(gathers))
        if "reduce" in changes:
            unit.set_custom_reduce_scatter(PeerReduceScatter(reductions))
        if "whole" in changes:
            unit.set_reshard_after_forward(False)
    if "units" in changes:
        embedding, head = ends
        assert isinstance(embedding, FSDPModule) and isinstance(head, FSDPModule)
        embedding.set_unshard_in_backward(False)  # its gradient needs no weight
        head.set_reshard_after_forward(False)  # backward begins with it
    shard(model)
    if "ahead" in changes:
        for i, layer in enumerate(layers):
            layer.set_modules_to_forward_prefetch(layers[i + 1 : i + 3])
            layer.set_modules_to_backward_prefetch(layers[max(0, i - 2) : i][::-1])


def gaps(step: Callable[[], float]) -> dict[str, Any]:
    """Return what the compute stream of rank 0 waits for in two steps, in milliseconds per step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as taken:
        step(), step()
        torch.cuda.synchronize()
    path = f"/tmp/trace{os.environ.get('RANK', '0')}.json"
    taken.export_chrome_trace(path)
    events = json.loads(Path(path).read_text())["traceEvents"]
    kinds = {"kernel", "gpu_memcpy", "gpu_memset"}
    on_gpu = [e for e in events if e.get("cat") in kinds]
    launched = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    streams: dict[Any, list[Any]] = {}
    for e in on_gpu:
        streams.setdefault(e["args"]["stream"], []).append(e)
    busy = {k: sum(e["dur"] for e in v) / 2e3 for k, v in streams.items()}
    main = sorted(streams[max(busy, key=busy.__getitem__)], key=lambda e: e["ts"])
    found: dict[str, list[float]] = {}
    for before, after in pairwise(main):
        gap = after["ts"] - before["ts"] - before["dur"]
        if gap > 20:
            late = after["ts"] - launched.get(after["args"].get("correlation"), 0) < 60
            key = f"{before['name'][:34]} | {after['name'][:34]} | {'cpu' if late else 'event'}"
            total = found.setdefault(key, [0.0, 0.0])
            total[0] += gap / 2e3
            total[1] += 0.5
    names: dict[str, float] = {}
    for k, v in streams.items():
        for e in v:
            key = f"{k} {e['name'][:60]}"
            names[key] = names.get(key, 0) + e["dur"] / 2e3
    top = sorted(names.items(), key=lambda x: -x[1])[:25]
    gaps = [(k, round(ms, 2), round(count, 2)) for k, (ms, count) in found.items()]
    return {
        "streams": {str(k): round(v, 1) for k, v in busy.items()},
        "gaps": sorted(gaps, key=lambda x: -x[1])[:14],
        "top": [(k, round(v, 2)) for k, v in top],
    }


def measured(name: str, steps: int, tokens: int) -> dict[str, Any]:
    """Return the figures of one variant, the same sequence on every rank."""
    changes, keys = VARIANTS[name]
    job = whole_steps.job_of({}, loss_kernel="chunked", **keys)
    if "RANK" in os.environ and not dist.is_initialized():
        local_run(job)
    if changes:
        parallel.shard = lambda *given: sharded(changes, *given)
    try:
        whole = whole_steps.Whole.of(job)
    finally:
        parallel.shard = ORIGINAL
    step = whole.stepper(tokens)
    losses = [step() for _ in range(4)]
    whole_steps.reset_peak()
    whole_steps.wait()
    start = time.perf_counter()
    losses += [step() for _ in range(steps)]
    seconds = (time.perf_counter() - start) / steps
    waits = gaps(step) if TRACE else {}
    return {
        "waits": waits,
        "seconds": seconds,
        "tokens_per_second_per_gpu": tokens / seconds,
        "peak_gib": whole_steps.peak_gib(),
        "losses": losses,
    }


ORIGINAL = parallel.shard
TRACE = "TRACE" in os.environ


def main() -> None:
    """Measure the variants in turn; rank 0 prints and writes after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=10, help="measured, after four")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    chosen = parser.parse_args()
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    whole_steps.DEVICE = torch.device("cuda", rank)
    torch.cuda.set_device(rank)
    results = whole_steps.head_of_results("python -m torch.distributed.run " + " ".join(sys.argv))
    results["figures"] = {}
    for name in chosen.only:
        results["figures"][name] = found = measured(name, chosen.steps, chosen.tokens)
        whole_steps.free()
        if rank == 0:
            speed = f"{1e3 * found['seconds']:8.1f} ms {found['tokens_per_second_per_gpu']:8.0f}"
            print(f"{name:<24}{speed} tokens/s {found['peak_gib']:6.1f} GiB", flush=True)
            for k, v in found["waits"].items():
                print(k, *(v if isinstance(v, list) else [v]), sep="\n   ")
            if chosen.out is not None:
                chosen.out.write_text(json.dumps(results, indent=1) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
