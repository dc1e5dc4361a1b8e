"""A job on N workers, computed (see traffic.py): traffic, checkpoints, load on the head, limits."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.estimate import traffic
from raytrain_adv.estimate.assumptions import Assumptions
from raytrain_adv.estimate.traffic import CheckpointCost, Times, Traffic
from raytrain_adv.transforms.applied import Transforms

# Processes on the head with a connection to every worker; a raylet serves its own node only.
# (base, per worker): lines fitted to measurements. Source: on_the_head in
# jobs/benchmarks/results/start_up.json.
HEAD_FILES = {"gcs_server": (66.0, 2.0), "controller": (53.0, 1.0)}  # open files by process
HEAD_CPU_S = (2.752, 0.1175)  # CPU seconds of both for a run of a few reports
HEAD_RSS_MIB = (247.958, 0.6583)  # resident, of both; a real controller has torch too: 190 MiB more

MOST_WORKERS = 16384  # limits are searched up to this number
LONG_LOAD_S = 600.0  # seconds of reading weights and checkpoint that count as a limit
ENVELOPE_NODES = 2000
"""Nodes of the largest cluster that Ray's release benchmarks start. Source: ray-project/ray, pull
request 64446 (placement groups and actors on 2,000 and more nodes)."""


@dataclass(frozen=True)
class Head:
    """The head's load by gcs_server and Ray Train's controller, extrapolated from few workers."""

    cpu_s: float  # CPU seconds of both to start and end a run
    files: float  # open files and sockets of the process with the most
    memory_gib: float  # resident memory of both

    @staticmethod
    def of(world_size: int) -> "Head":
        """Extrapolate: base + workers x per worker."""
        cpu, rss, *files = (
            base + each * world_size
            for base, each in (HEAD_CPU_S, HEAD_RSS_MIB, *HEAD_FILES.values())
        )
        return Head(cpu, max(files), rss / 1024)


@dataclass(frozen=True)
class Scale:
    """A job on one number of workers."""

    world_size: int
    nodes: int
    moved: Traffic
    times: Times
    gpu: str  # the GPU whose peak is used; empty on CPUs
    checkpoint: CheckpointCost
    saves: bool  # whether the job saves checkpoints
    save_interval: float | None  # fewest seconds between two checkpoints; None if unknown
    head: Head
    global_batch: int
    assumed: Assumptions


BANDWIDTHS = (25, 50, 100)
"""GB/s into one GPU for which a gain is computed."""


@dataclass(frozen=True)
class Limit:
    """A limit that more workers reach."""

    workers: int  # the fewest workers that reach it, of powers of two and the planned number
    what: str
    fix: str


@dataclass(frozen=True)
class Work:
    """The part of a job that does not depend on the number of workers."""

    model: PreTrainedModel
    job: JobConfig
    flops_per_token: float
    tokens_per_sequence: float
    num_sequences: int
    save_every: int  # steps between two checkpoints; 0 if the interval is not in steps
    gpu: str  # name of the GPU; empty on CPUs

    def at(self, world_size: int, a: Assumptions) -> Scale:
        """Compute the job on this number of workers."""
        job, train = self.job, self.job.train
        moved = traffic.traffic(self.model, job, world_size)
        sequences = train.per_device_train_batch_size * train.gradient_accumulation_steps
        compute = interval = None
        if self.gpu:
            compute = self._compute_seconds(moved)
        times = Times(*traffic.communication(moved, a), compute)
        if compute is not None and self.save_every:
            interval = self.save_every * max(compute, times.communication)
        return Scale(
            world_size=world_size,
            nodes=math.ceil(world_size / a.gpus_per_node),
            moved=moved,
            times=times,
            gpu=self.gpu,
            checkpoint=traffic.checkpoint_cost(self.model, job, world_size, a),
            saves=job.output.save_strategy != "no",
            save_interval=interval,
            head=Head.of(world_size),
            global_batch=sequences * world_size // job.parallel.sequence_parallel_size,
            assumed=a,
        )

    def _compute_seconds(self, moved: Traffic) -> float:
        """Return a GPU's computation in a step in seconds."""
        job = self.job
        sequences = job.train.per_device_train_batch_size * job.train.gradient_accumulation_steps
        tokens = sequences * self.tokens_per_sequence / job.parallel.sequence_parallel_size
        return traffic.compute_seconds(job, self.flops_per_token, tokens, self.gpu, moved)

    def gain_of_gathering(self, world_size: int) -> str:
        """Return what it gains that transforms change what is gathered, by the bandwidth into a
        GPU; nothing if none does, or the GPU is not known.
        """
        changed = traffic.traffic(self.model, self.job, world_size)
        plain = traffic.traffic(self.model, self.job, world_size, plain=True)
        if not self.gpu or plain.gathered == changed.gathered:
            return ""
        compute = self._compute_seconds(plain)

        def step(moved: Traffic, gb_s: int) -> float:
            return max(compute, moved.received / (gb_s * traffic.GB))

        gains = (f"{step(plain, b) / step(changed, b) - 1:.0%} at {b}" for b in BANDWIDTHS)
        return (
            f"{changed.gathered / traffic.GB:.1f} GB are gathered a step instead of "
            f"{plain.gathered / traffic.GB:.1f}: worth it where fewer than "
            f"{plain.received / compute / traffic.GB:.0f} GB/s reach a GPU ({', '.join(gains)} "
            "GB/s); NVLink brings more, and steps there are not shorter"
        )

    def limits(self, planned: int, a: Assumptions) -> list[Limit]:
        """Return each limit with its fewest workers, in order, up to MOST_WORKERS."""
        counts = sorted({planned, *(2**n for n in range(1, MOST_WORKERS.bit_length()))})
        found: dict[str, Limit] = {}
        for count in counts:
            options = self.job.parallel
            shards = min(options.fsdp_shard_size or 1, count)
            if count % math.lcm(shards, options.sequence_parallel_size) == 0:
                for is_met, what, fix, name in self._checks(self.at(count, a)):
                    if is_met:
                        found.setdefault(name, Limit(count, what, fix))
        return list(found.values())

    def _checks(self, s: Scale) -> Iterator[tuple[bool, str, str, str]]:
        """Yield for each limit whether it is reached, a sentence, a fix and a name."""
        a, t, c = s.assumed, s.times, s.checkpoint
        most = "hops between GPUs" if t.latency > t.bandwidth else "bytes over the network"
        yield (
            t.compute is not None and t.communication > t.compute,
            f"collectives take longer than computation, most of it {most}",
            self._less_communication(s),
            "network",
        )
        interval = math.inf if s.save_interval is None else s.save_interval
        yield (
            c.save > interval,
            f"a checkpoint is not written ({c.save:,.0f} s) before the next is due "
            f"({interval:,.0f} s)",
            "raise save_steps, or storage_gb_s: faster storage as ray_storage_path",
            "storage",
        )
        yield (
            c.load + c.model_load > LONG_LOAD_S,
            f"reading weights and checkpoint takes {c.load + c.model_load:,.0f} s",
            "faster storage; every copy of the model reads it, and every rank .metadata, which "
            "grows with fsdp_shard_size",
            "start",
        )
        yield (
            s.global_batch > self.num_sequences,
            f"a step takes {s.global_batch:,} sequences, more than the data has",
            "more data, or fewer workers: the batch of a step grows with them",
            "data",
        )
        yield (
            s.head.files > a.open_files,
            f"a process on the head has about {s.head.files:,.0f} open files (extrapolated)",
            f"raise ulimit -n there above {a.open_files:,.0f}",
            "head node",
        )
        yield (
            s.nodes > ENVELOPE_NODES,
            f"{s.nodes:,} nodes are more than Ray's release benchmarks start",
            "test Ray alone on as many nodes first",
            "Ray",
        )

    def _less_communication(self, s: Scale) -> str:
        per_node = int(s.assumed.gpus_per_node)
        fewer = f"fsdp_shard_size: {per_node}, or the fewest workers that fit a copy (see memory)"
        return "; ".join(
            [
                *([fewer] if s.moved.shard_size > per_node else []),
                *filter(None, (g.less_with for g in Transforms(self.job).gathering(self.model))),
                "more tokens a pass: per_device_train_batch_size",
            ]
        )
