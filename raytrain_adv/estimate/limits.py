"""A job on N workers as a whole: what it moves, stores and asks of the head node, and the limits
that more workers run into, the first one first. By computation; see scale.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.estimate.assumptions import Assumptions
from raytrain_adv.estimate.traffic import (
    CheckpointCost,
    Times,
    Traffic,
    checkpoint_cost,
    communication,
    compute_seconds,
    traffic,
)
from raytrain_adv.transforms.fp8 import Fp8

HEAD_ROLES = ("gcs_server", "controller")
"""Processes on the head that every worker is connected to; a raylet serves its own node's."""
# (base, per worker): lines through what was measured. Source: on_the_head in
# jobs/benchmarks/results/start_up.json.
HEAD_FILES = {"gcs_server": (66.0, 2.0), "controller": (53.0, 1.0)}
"""Open files by process."""
HEAD_CPU_S = (2.752, 0.1175)
"""CPU seconds of both for a run of a few reports."""
HEAD_RSS_MIB = (247.958, 0.6583)
"""Resident MiB of both; the controller of a real run has torch too, some 190 MiB."""

MOST_WORKERS = 16384
"""Limits are looked for up to here."""
LONG_LOAD_S = 600.0
"""Seconds of reading weights and checkpoint that count as a limit."""
ENVELOPE_NODES = 2000
"""Nodes of the largest cluster that Ray's release benchmarks start. Source: ray-project/ray, pull
request 64446 (placement groups and actors on 2,000 and more nodes)."""


@dataclass(frozen=True)
class Head:
    """What the control plane takes on the head node, extrapolated from a few CPU workers."""

    cpu_s: float
    """CPU seconds of HEAD_ROLES for a run to start and to end."""
    files: float
    """Open files, sockets among them, of the process that has most."""
    memory_gib: float
    """Resident memory of both."""

    @staticmethod
    def of(world_size: int) -> Head:
        """Follow the measured lines: base + workers x per worker."""
        files = max(base + each * world_size for base, each in HEAD_FILES.values())
        (cpu, cpu_each), (rss, rss_each) = HEAD_CPU_S, HEAD_RSS_MIB
        return Head(cpu + cpu_each * world_size, files, (rss + rss_each * world_size) / 1024)


@dataclass(frozen=True)
class Scale:
    """A job on one number of workers."""

    world_size: int
    nodes: int
    moved: Traffic
    times: Times
    gpu: str
    """Whose peak the computation is taken from; empty on CPUs."""
    checkpoint: CheckpointCost
    saves: bool
    """Whether the job saves checkpoints at all."""
    save_interval: float | None
    """Seconds between two checkpoints at the least; none where that is not known."""
    head: Head
    global_batch: int
    assumed: Assumptions


@dataclass(frozen=True)
class Limit:
    """Something that more workers run into."""

    workers: int
    """The fewest, of powers of two and the number planned for, that do."""
    what: str
    fix: str


@dataclass(frozen=True)
class Work:
    """What does not depend on the number of workers."""

    model: PreTrainedModel
    job: JobConfig
    flops_per_token: float
    tokens_per_sequence: float
    num_sequences: int
    save_every: int
    """Steps between two checkpoints; 0 where it is not a number of steps."""
    gpu: str
    """Name of the GPU; empty on CPUs."""

    def at(self, world_size: int, a: Assumptions) -> Scale:
        """Work out this number of workers."""
        job, train = self.job, self.job.train
        moved = traffic(self.model, job, world_size)
        sequences = train.per_device_train_batch_size * train.gradient_accumulation_steps
        compute = None
        if self.gpu:
            tokens = sequences * self.tokens_per_sequence
            compute = compute_seconds(job, self.flops_per_token, tokens, self.gpu, moved)
        times = Times(*communication(moved, a), compute)
        interval = None
        if compute is not None and self.save_every:
            interval = self.save_every * max(compute, times.communication)
        return Scale(
            world_size=world_size,
            nodes=math.ceil(world_size / a.gpus_per_node),
            moved=moved,
            times=times,
            gpu=self.gpu,
            checkpoint=checkpoint_cost(self.model, job, world_size, a),
            saves=job.output.save_strategy != "no",
            save_interval=interval,
            head=Head.of(world_size),
            global_batch=sequences * world_size,
            assumed=a,
        )

    def limits(self, asked: int, a: Assumptions) -> list[Limit]:
        """Return each limit with the workers it begins at, the first one first; none that lies
        beyond MOST_WORKERS.
        """
        counts = sorted({asked, *(2**n for n in range(1, int(math.log2(MOST_WORKERS)) + 1))})
        shard_size = self.job.parallel.fsdp_shard_size or 1
        found: dict[str, Limit] = {}
        for count in counts:
            if count % min(shard_size, count):
                continue
            for name, what, fix in self._met(self.at(count, a)):
                found.setdefault(name, Limit(count, what, fix))
        return sorted(found.values(), key=lambda limit: limit.workers)

    def _met(self, s: Scale) -> Iterator[tuple[str, str, str]]:
        """Yield name, sentence and remedy of the limits that are met."""
        a, t, c = s.assumed, s.times, s.checkpoint
        if t.compute is not None and t.communication > t.compute:
            latency = t.latency > t.bandwidth
            most = "hops between GPUs" if latency else "bytes over the network"
            yield (
                "network",
                f"collectives take longer than computation, most of it {most}",
                self._less_communication(s),
            )
        if s.save_interval is not None and c.save > s.save_interval:
            yield (
                "storage",
                f"a checkpoint is not written ({c.save:,.0f} s) before the next is due "
                f"({s.save_interval:,.0f} s)",
                "raise save_steps, or storage_gb_s: faster storage as ray_storage_path",
            )
        if c.load + c.model_load > LONG_LOAD_S:
            yield (
                "start",
                f"reading weights and checkpoint takes {c.load + c.model_load:,.0f} s",
                "faster storage; every copy of the model reads it, and every rank .metadata, which "
                "grows with fsdp_shard_size",
            )
        if s.global_batch > self.num_sequences:
            yield (
                "data",
                f"a step takes {s.global_batch:,} sequences, more than the data have",
                "more data, or fewer workers: the batch of a step grows with them",
            )
        if s.head.files > a.open_files:
            yield (
                "head node",
                f"a process on the head has about {s.head.files:,.0f} open files (extrapolated)",
                f"raise ulimit -n there above {a.open_files:,.0f}",
            )
        if s.nodes > ENVELOPE_NODES:
            yield (
                "Ray",
                f"{s.nodes:,} nodes are more than Ray's release benchmarks start",
                "try Ray alone on as many nodes first",
            )

    def _less_communication(self, s: Scale) -> str:
        per_node = int(s.assumed.gpus_per_node)
        changes = []
        if s.moved.shard_size > per_node:
            changes.append(
                f"fsdp_shard_size: {per_node}, or the fewest workers that hold a copy (see memory)"
            )
        fp8 = self.job.transform(Fp8)
        if fp8.enabled and fp8.is_tensorwise and not fp8.fp8_enable_fsdp_float8_all_gather:
            changes.append("fp8_enable_fsdp_float8_all_gather: true")
        changes.append("more tokens a pass: per_device_train_batch_size")
        return "; ".join(changes)
