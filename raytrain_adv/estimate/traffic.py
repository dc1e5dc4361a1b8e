"""A job on many workers, computed: bytes moved, their time, and checkpoints. Nothing here was
measured on many GPUs: byte counts are exact (compared with real collectives and checkpoints in
tests/unit/estimate/test_traffic.py), times follow from the assumptions.

Units: bytes, seconds; GB are 10^9 bytes. Workers are numbered node by node, as Ray Train does.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.estimate.assumptions import Assumptions
from raytrain_adv.estimate.sizes import has_8bit_states, num_bytes, num_rows, shard_size
from raytrain_adv.hardware import peak_flops
from raytrain_adv.model.build import decoder_layers
from raytrain_adv.model.parallel import checkpointing_mode, compute_dtype, ends, reduce_dtype
from raytrain_adv.transforms.applied import Transforms

GB = 1e9
COLLECTIVE_S = 8.4e-6  # base latency. Source: NCCL's tuning table, base latency, ring, Simple

MFU = {"none": 0.574, "selective": 0.548, "attention": 0.470, "full": 0.470}
"""gradient_checkpointing -> model FLOPs utilization on one H200, 8B shape, compiled, 8,192 tokens a
pass; attention's, which was not measured, as full's. Source: llama3_8b_bf16.json of
jobs/benchmarks/results."""
EAGER_SPEED = 0.856  # 743 ms compiled, 868 ms not: jobs/benchmarks/results/layer_kernels.json

COPIED_B_S = 1.08e12
"""Bytes gathered and reduced per second of FSDP2's own copies of them: 8 % of the 8B shape's 742 ms
on one H200, of 64.2 GB. Source: model/parallel.py, needs_fsdp."""

PART_BYTES = 1555
"""Bytes around each part of a tensor in a checkpoint's data files: torch.save's archive. Counted
with torch 2.13."""
ENTRY_BYTES = 265  # of each part in .metadata. Counted with torch 2.13; longer names take more
SETTINGS = 24  # entries of the optimizer's settings, such as lr, of two groups of parameters


@dataclass(frozen=True)
class Traffic:
    """The traffic of FSDP2's collectives in one optimizer step: bytes of whole tensors over all
    ranks of a group, and numbers of collectives.
    """

    shard_size: int  # ranks that share a copy of the model
    replicas: int  # copies of the model; more than one is HSDP
    gathered: int  # whole parameters, once for each all-gather
    gathers: int
    reduced: int  # whole gradients, once for each reduce-scatter
    reductions: int
    all_reduced: int  # one rank's shard of the gradients, once for each all-reduce between copies
    all_reductions: int

    @property
    def inside(self) -> float:
        """Bytes that one GPU receives within a copy by rings: (n - 1) / n of all."""
        return (self.shard_size - 1) / self.shard_size * (self.gathered + self.reduced)

    @property
    def between(self) -> float:
        """Bytes that one GPU receives from other copies: twice (n - 1) / n of the reduced ones."""
        return 2 * (self.replicas - 1) / self.replicas * self.all_reduced

    @property
    def received(self) -> float:
        """Bytes that one GPU receives."""
        return self.inside + self.between


class Unit(NamedTuple):
    """What FSDP2 gathers and reduces as a whole, in bytes, with padding."""

    gathered: int  # of its parameters as they are sent
    reduced: int  # of its gradients as they are summed, 0 if it is frozen
    times: int  # gathers in a forward and a backward pass


def units(model: PreTrainedModel, job: JobConfig, shards: int, plain: bool = False) -> list[Unit]:
    """Return the units: layers, embedding and head, and the rest of the model (model/parallel.py).
    The model is not sharded; the meta device is enough. `plain` leaves out what transforms change.

    A parameter is split along its first dimension into equal parts for all ranks: rows are padded
    to a multiple of them. It is sent in the compute dtype, packed weights as their bytes, and what
    transforms gather in another dtype in that one.
    """
    changed = () if plain else Transforms(job).gathering(model)
    sizes = {id(p): size for g in changed for p, size in g.sizes.items()}
    layers = [list(layer.parameters()) for _, layer in decoder_layers(model)]
    alone = [list(end.parameters()) for end in ends(model, job)]
    inside = {id(p) for unit in (*layers, *alone) for p in unit}
    rest = [p for p in model.parameters() if id(p) not in inside]
    again = 1 if job.parallel.fsdp_reshard_after_forward is False else 2
    times = [*(again for _ in layers), *(1 for _ in alone), again]
    found = []
    for parameters, count in zip((*layers, *alone, rest), times, strict=True):
        gathered = reduced = 0
        for p in parameters:
            rows, row = num_rows(p)
            padded = -(-rows // shards) * shards * row
            size = compute_dtype(job).itemsize if p.is_floating_point() else p.element_size()
            gathered += padded * sizes.get(id(p), size)
            reduced += padded * reduce_dtype(job).itemsize if p.requires_grad else 0
        if gathered:
            found.append(Unit(gathered, reduced, count))
    return found


def traffic(
    model: PreTrainedModel, job: JobConfig, world_size: int, plain: bool = False
) -> Traffic:
    """Return a step's traffic, without a few scalars: the loss, the norm.

    Each pass of gradient accumulation gathers every layer in forward and again in backward, or once
    with fsdp_reshard_after_forward: false, and reduces each trained unit; copies of the model then
    sum their shards.
    """
    shards = shard_size(job, world_size)
    replicas = world_size // shards
    passes = job.train.gradient_accumulation_steps
    found = units(model, job, shards, plain)
    gathers = passes * (shards > 1)
    trained = [unit.reduced for unit in found if unit.reduced]
    reduced, reductions = passes * sum(trained), passes * len(trained)
    return Traffic(
        shard_size=shards,
        replicas=replicas,
        gathered=gathers * sum(unit.times * unit.gathered for unit in found),
        gathers=gathers * sum(unit.times for unit in found),
        reduced=reduced if shards > 1 else 0,
        reductions=reductions if shards > 1 else 0,
        all_reduced=reduced // shards if replicas > 1 else 0,
        all_reductions=reductions if replicas > 1 else 0,
    )


@dataclass(frozen=True)
class Times:
    """A step's times on GPUs, without overlap."""

    bandwidth: float  # bytes over the narrowest link they pass
    latency: float  # hops of all rings, one after another
    compute: float | None  # FSDP2's copies of the bytes included; None if no rate is known

    @property
    def communication(self) -> float:
        """The sum of both; FSDP2 overlaps it with computation as far as possible."""
        return self.bandwidth + self.latency

    @property
    def most_exposed(self) -> float:
        """Communication's share of a step without overlap: the upper bound."""
        compute = self.compute or 0.0
        return self.communication / (compute + self.communication)

    @property
    def least_exposed(self) -> float:
        """The share with full overlap: above 0 if communication takes longer."""
        compute = self.compute or 0.0
        return max(self.communication - compute, 0.0) / max(self.communication, compute)


def communication(moved: Traffic, a: Assumptions) -> tuple[float, float]:
    """Return the seconds of a step's collectives: by bandwidth, and by latency.

    Bandwidth: a ring over n ranks brings (n - 1) / n of the bytes into each GPU over NVLink, and
    into each node over all its network ports. Between copies every GPU of a node has its own ring,
    and they share the network. Latency: a base and n - 1 hops, of which (nodes - 1) go over the
    network; an all-reduce needs two rounds. Source: NCCL, graph/tuning.cc.
    """
    per_node, nvlink, network = int(a.gpus_per_node), a.nvlink_gb_s * GB, a.network_gb_s * GB
    nodes = math.ceil(moved.shard_size / per_node)
    bandwidth = moved.inside / (min(nvlink, network) if nodes > 1 else nvlink)
    calls = moved.gathers + moved.reductions
    latency = calls * (COLLECTIVE_S + _hops(moved.shard_size, nodes, a))
    if moved.replicas > 1:
        world_nodes = math.ceil(moved.shard_size * moved.replicas / per_node)
        spread = min(moved.replicas, world_nodes)
        rings = min(moved.shard_size, per_node) if spread > 1 else 0
        bandwidth += max(moved.between / nvlink, rings * moved.between / network)
        hops = 2 * _hops(moved.replicas, spread, a)
        latency += moved.all_reductions * (COLLECTIVE_S + hops)
    return bandwidth, latency


def _hops(ranks: int, nodes: int, a: Assumptions) -> float:
    between = nodes - 1
    return (between * a.network_hop_us + (ranks - 1 - between) * a.nvlink_hop_us) * 1e-6


def compute_seconds(
    job: JobConfig, flops_per_token: float, tokens: float, gpu: str, moved: Traffic
) -> float:
    """Return a GPU's computation in a step in seconds, without communication.

        operations / (the GPU's dense bf16 peak x the MFU measured on one H200)
        + (bytes gathered + bytes reduced) / COPIED_B_S

    `tokens` are those of one GPU in one optimizer step; a GPU without a known peak counts as an
    H100. The MFU is that of the nearest measured job: by gradient_checkpointing, transforms and
    torch_compile. Fewer tokens a pass than the 8,192 of the measurement reach less.
    """
    speeds = [transform.speed for transform in Transforms(job)]
    mfu = MFU[checkpointing_mode(job)] * math.prod(speeds)
    mfu *= 1.0 if job.parallel.torch_compile else EAGER_SPEED
    peak = next(filter(None, (peak_flops(name) for name in (gpu, "H100"))))
    copies = (moved.gathered + moved.reduced) / COPIED_B_S
    return tokens * flops_per_token / (peak * mfu) + copies


@dataclass(frozen=True)
class CheckpointCost:
    """A checkpoint in bytes and seconds."""

    total: float  # bytes in storage: trained parameters and, unless disabled, optimizer states
    per_rank: float  # bytes that each rank copies to host memory; each state is written by one copy
    metadata: float  # bytes of .metadata in it, written by rank 0 and read by every rank
    staging: float  # seconds that training waits for the copy into host memory
    save: float  # seconds of the background write
    load: float  # seconds to read it into all shards of all copies
    model_load: float  # seconds to read the initial weights; 0 from scratch


def saved_bytes(model: nn.Module, job: JobConfig, world_size: int) -> tuple[float, float]:
    """Return the bytes of a checkpoint, and those of .metadata among them.

        sum over trained parameters of numel x (bytes of a parameter + bytes of two states)
        + entries x (PART_BYTES + ENTRY_BYTES)

    A parameter has an entry for each rank of a copy, even if its part is empty, as many for each of
    its states, and one for its step, a scalar. AdamW's states have the parameter's dtype; those of
    8 bits are written in float32 (checkpoint/staging.py).
    """
    shards = shard_size(job, world_size)
    with_states = not job.output.save_only_model
    values, entries = 0.0, SETTINGS if with_states else 0
    for p in (p for p in model.parameters() if p.requires_grad):
        size = p.element_size()
        states = 2 * (4 if has_8bit_states(p, job, shards) else size) if with_states else 0
        values += p.numel() * (size + states)
        entries += 3 * shards + 1 if with_states else shards
    return values + entries * (PART_BYTES + ENTRY_BYTES), entries * ENTRY_BYTES


def checkpoint_cost(
    model: nn.Module, job: JobConfig, world_size: int, a: Assumptions
) -> CheckpointCost:
    """Return a checkpoint's cost: bytes over the bandwidth of storage or of one node, whichever
    takes longer. Every copy of the model is read, and .metadata on every rank.
    """
    total, metadata = saved_bytes(model, job, world_size)
    per_rank = total / shard_size(job, world_size)
    replicas = world_size // shard_size(job, world_size)
    nodes = math.ceil(world_size / a.gpus_per_node)
    whole_model = 0 if job.model.train_from_scratch else num_bytes(model.parameters())

    def seconds(volume: float) -> float:
        return max(volume / (a.storage_gb_s * GB), volume / nodes / (a.storage_node_gb_s * GB))

    return CheckpointCost(
        total=total,
        per_rank=per_rank,
        metadata=metadata,
        staging=per_rank / (a.host_copy_gb_s * GB),
        save=seconds(total),
        load=seconds(total * replicas + metadata * (world_size - replicas)),
        model_load=seconds(whole_model * replicas),
    )
