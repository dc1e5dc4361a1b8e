"""A job on many workers, by computation: bytes moved, their time, checkpoints, the head node, and
which limit comes first. Nothing here was measured on many GPUs: byte counts are exact (compared
with real collectives and checkpoints in tests/unit/estimate/test_traffic.py), times follow from the
assumptions.

Units: bytes, seconds; GB are 10^9 bytes. Workers are numbered node by node, as Ray Train does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.estimate.assumptions import Assumptions
from raytrain_adv.estimate.memory import REDUCE_BYTES
from raytrain_adv.estimate.sizes import has_8bit_states, num_bytes
from raytrain_adv.hardware import peak_flops
from raytrain_adv.model.build import decoder_layers
from raytrain_adv.model.parallel import checkpointing_mode, compute_dtype
from raytrain_adv.transforms.fp8 import Fp8
from raytrain_adv.transforms.lora import Lora
from raytrain_adv.transforms.qat import Qat

GB = 1e9
COLLECTIVE_S = 8.4e-6
"""A collective before its first hop. Source: NCCL's tuning table, base latency, ring, Simple."""

MFU = {"none": 0.574, "selective": 0.548, "full": 0.470}
"""gradient_checkpointing -> model FLOPs utilization on one H200, 8B shape, compiled, 8,192 tokens a
pass. Source: jobs/benchmarks/results/llama3_8b_bf16.json."""
FP8_SPEEDUP = 1.32
"""Source: jobs/benchmarks/results/llama3_8b_fp8.json, tensorwise."""
QAT_SPEED = 0.94
"""Source: jobs/benchmarks/results/llama3_8b_qat.json, int4."""
EAGER_SPEED = 0.856
"""Source: jobs/benchmarks/results/layer_kernels.json: 743 ms compiled, 868 ms not."""
LORA_SPEED = 0.885
"""MFU under LoRA to that of full training: 599 ms for 0.71 of the operations. Source:
jobs/benchmarks/results/fp8_pairs.json."""

COPIED_B_S = 1.08e12
"""Bytes gathered and reduced per second of FSDP2's own copies of them: 8 % of the 8B shape's 742 ms
on one H200, of 64.2 GB. Source: worker/parallel.py, needs_fsdp."""

PART_BYTES = 1555
"""What a checkpoint's data files hold beside the values of each part of a tensor: torch.save's
archive around it. Counted with torch 2.13."""
ENTRY_BYTES = 265
"""What .metadata holds of each part. Counted with torch 2.13; longer names take more."""
SETTINGS = 24
"""Entries of the optimizer's settings, such as lr, of two groups of parameters."""


@dataclass(frozen=True)
class Unit:
    """A module that FSDP2 gathers and reduces as a whole: a layer, or what is outside of them."""

    gathered: int
    """Bytes of its whole parameters as they are sent, padding included."""
    reduced: int
    """Bytes of its whole gradients in float32, padding included; 0 where all of it is frozen."""


@dataclass(frozen=True)
class Traffic:
    """What FSDP2's collectives move in one optimizer step; bytes of whole tensors over all ranks
    of a group, and how many collectives.
    """

    shard_size: int
    """Ranks that share a copy of the model."""
    replicas: int
    """Copies of the model; more than one is HSDP."""
    gathered: int
    """Whole parameters, once for each all-gather."""
    gathers: int
    reduced: int
    """Whole gradients, once for each reduce-scatter."""
    reductions: int
    all_reduced: int
    """One rank's shard of the gradients, once for each all-reduce between copies."""
    all_reductions: int

    @property
    def received(self) -> float:
        """Bytes that come into one GPU, by rings: (n - 1) / n of what is gathered or reduced, twice
        that of what is all-reduced.
        """
        between = 2 * _share(self.replicas) * self.all_reduced
        return _share(self.shard_size) * (self.gathered + self.reduced) + between


def units(model: PreTrainedModel, job: JobConfig, shard_size: int) -> list[Unit]:
    """Return what FSDP2 is applied to, as worker/parallel.py does it.

    A parameter is cut along its first dimension into equal parts for all ranks: rows are padded to
    a multiple of them. It is sent in the compute dtype, quantized ones as their bytes, weights that
    FP8 gathers as one byte a number.

    Args:
        model: after its transforms, before sharding; the meta device is enough.
        job: the resolved job.
        shard_size: ranks that share a copy.
    """
    in_float8 = {id(p) for p in _gathered_in_float8(model, job)}
    layers = [list(layer.parameters()) for _, layer in decoder_layers(model)]
    inside = {id(p) for layer in layers for p in layer}
    outside = [p for p in model.parameters() if id(p) not in inside]
    found = []
    for parameters in (*layers, outside):
        gathered = reduced = 0
        for p in parameters:
            padded = _padded(p, shard_size)
            size = compute_dtype(job).itemsize if p.is_floating_point() else p.element_size()
            gathered += padded * (1 if id(p) in in_float8 else size)
            reduced += padded * REDUCE_BYTES if p.requires_grad else 0
        found.append(Unit(gathered, reduced))
    return found


def _padded(parameter: nn.Parameter, shard_size: int) -> int:
    rows = parameter.shape[0] if parameter.ndim else 1
    return -(-rows // shard_size) * shard_size * (parameter.numel() // max(rows, 1))


def _gathered_in_float8(model: nn.Module, job: JobConfig) -> Iterator[nn.Parameter]:
    """Yield the weights that Fp8.before_sharding has FSDP2 gather in float8."""
    fp8 = job.transform(Fp8)
    if not (fp8.enabled and fp8.fp8_enable_fsdp_float8_all_gather):
        return
    from torchao.float8.float8_linear import Float8Linear

    for module in model.modules():
        if isinstance(module, Float8Linear):
            yield module.weight


def traffic(model: PreTrainedModel, job: JobConfig, world_size: int) -> Traffic:
    """Return what a step moves.

    Each pass (gradient accumulation has several) gathers every unit in forward and again in
    backward, or once with fsdp_reshard_after_forward: false, and reduces each unit that is trained;
    copies of the model then add their shards up. Left out are a few scalars: the loss, the norm.
    """
    shard_size = min(job.parallel.fsdp_shard_size or world_size, world_size)
    replicas = world_size // shard_size
    passes = job.train.gradient_accumulation_steps
    times = passes * (2 if job.parallel.fsdp_reshard_after_forward else 1)
    found = units(model, job, shard_size)
    trained = [unit for unit in found if unit.reduced]
    reduced = passes * sum(unit.reduced for unit in trained)
    return Traffic(
        shard_size=shard_size,
        replicas=replicas,
        gathered=times * sum(unit.gathered for unit in found) if shard_size > 1 else 0,
        gathers=times * len(found) if shard_size > 1 else 0,
        reduced=reduced if shard_size > 1 else 0,
        reductions=passes * len(trained) if shard_size > 1 else 0,
        all_reduced=reduced // shard_size if replicas > 1 else 0,
        all_reductions=passes * len(trained) if replicas > 1 else 0,
    )


def _share(size: int) -> float:
    return (size - 1) / size


@dataclass(frozen=True)
class Times:
    """A step's times on GPUs, none of it hidden behind another."""

    bandwidth: float
    """Bytes over the narrowest link they pass."""
    latency: float
    """Hops of all rings, one after another."""
    compute: float | None
    """Computation, with FSDP2's copies of what it gathers and reduces; none where no rate is known.
    """

    @property
    def communication(self) -> float:
        """Both parts; FSDP2 overlaps them with computation as far as it can."""
        return self.bandwidth + self.latency

    @property
    def most_exposed(self) -> float | None:
        """Communication's share of a step that hides none of it: the upper bound."""
        if self.compute is None:
            return None
        return self.communication / (self.compute + self.communication)

    @property
    def least_exposed(self) -> float | None:
        """The share of a step that hides all it can: above 0 where communication takes longer."""
        if self.compute is None:
            return None
        return max(self.communication - self.compute, 0.0) / max(self.communication, self.compute)


def communication(moved: Traffic, a: Assumptions) -> tuple[float, float]:
    """Return the seconds of a step's collectives: by bandwidth, and by latency.

    Bandwidth: a ring over n ranks brings (n - 1) / n of the bytes into each GPU over NVLink, and
    into each node over its network, all ports together. Between copies every GPU of a node has a
    ring of its own, and they share the network. Latency: a base, and n - 1 hops, of which
    (nodes - 1) go over the network; an all-reduce goes round twice. Source: NCCL, graph/tuning.cc.
    """
    per_node = int(a.gpus_per_node)
    nodes = math.ceil(moved.shard_size / per_node)
    inside = _share(moved.shard_size) * (moved.gathered + moved.reduced)
    bandwidth = inside / (a.nvlink_gb_s * GB)
    if nodes > 1:
        bandwidth = max(bandwidth, inside / (a.network_gb_s * GB))
    calls = moved.gathers + moved.reductions
    latency = calls * (COLLECTIVE_S + _hops(moved.shard_size, nodes, a))
    if moved.replicas > 1:
        world_nodes = math.ceil(moved.shard_size * moved.replicas / per_node)
        spread = min(moved.replicas, world_nodes)
        between = 2 * _share(moved.replicas) * moved.all_reduced
        rings = min(moved.shard_size, per_node)
        over_network = rings * between / (a.network_gb_s * GB) if spread > 1 else 0.0
        bandwidth += max(between / (a.nvlink_gb_s * GB), over_network)
        hops = 2 * _hops(moved.replicas, spread, a)
        latency += moved.all_reductions * (COLLECTIVE_S + hops)
    return bandwidth, latency


def _hops(ranks: int, nodes: int, a: Assumptions) -> float:
    between = nodes - 1
    return (between * a.network_hop_us + (ranks - 1 - between) * a.nvlink_hop_us) * 1e-6


def compute_seconds(
    job: JobConfig, flops_per_token: float, tokens: float, gpu: str, moved: Traffic
) -> float:
    """Return the seconds that a GPU computes in a step, no communication in it.

        operations / (the GPU's dense bf16 peak x the MFU measured on one H200)
        + (bytes gathered + bytes reduced) / COPIED_B_S

    The MFU is that of the nearest measured job: by gradient_checkpointing, FP8, QAT, LoRA and
    torch_compile. Fewer tokens a pass than the 8,192 of the measurement reach less.

    Args:
        job: the resolved job.
        flops_per_token: of forward and backward.
        tokens: of one GPU in one optimizer step.
        gpu: its name; one without a known peak counts as an H100.
        moved: what FSDP2 moves in the step.
    """
    mfu = MFU[checkpointing_mode(job)]
    mfu *= FP8_SPEEDUP if job.transform(Fp8).enabled else 1.0
    mfu *= QAT_SPEED if job.transform(Qat).enabled else 1.0
    mfu *= LORA_SPEED if job.transform(Lora).enabled else 1.0
    mfu *= 1.0 if job.parallel.torch_compile else EAGER_SPEED
    peak = peak_flops(gpu, "bf16") or peak_flops("H100", "bf16")
    assert peak is not None  # the table has an H100
    copies = (moved.gathered + moved.reduced) / COPIED_B_S
    return tokens * flops_per_token / (peak.value * mfu) + copies


@dataclass(frozen=True)
class CheckpointCost:
    """A checkpoint in bytes and seconds."""

    total: float
    """Bytes in storage: trained parameters, and the optimizer's states unless left out."""
    per_rank: float
    """Bytes that each rank copies to host memory; copies of the model are written once."""
    metadata: float
    """Bytes of .metadata, which rank 0 writes and every rank reads; part of the total."""
    staging: float
    """Seconds that training stands still: the copy into host memory."""
    save: float
    """Seconds of the write in the background."""
    load: float
    """Seconds to read it into all shards of all copies."""
    model_load: float
    """Seconds to read the weights that training starts from; 0 from scratch."""


def saved_bytes(model: nn.Module, job: JobConfig, world_size: int) -> tuple[float, float]:
    """Return the bytes of a checkpoint, and those of .metadata among them.

        sum over trained parameters of numel x (bytes of a parameter + bytes of two states)
        + entries x (PART_BYTES + ENTRY_BYTES)

    A parameter has an entry for each rank of a copy, also one whose part is empty, as many for each
    of its states, and one for a scalar, its step. AdamW's states have the parameter's dtype; those
    of 8 bits are written in float32 (worker/staging.py).
    """
    shard_size = min(job.parallel.fsdp_shard_size or world_size, world_size)
    with_states = not job.output.save_only_model
    values, entries = 0.0, SETTINGS if with_states else 0
    for p in model.parameters():
        if not p.requires_grad:
            continue
        size, quantized = p.element_size(), has_8bit_states(p, job, shard_size)
        states = 2 * (4 if quantized else size) if with_states else 0
        values += p.numel() * (size + states)
        entries += 3 * shard_size + 1 if with_states else shard_size
    return values + entries * (PART_BYTES + ENTRY_BYTES), entries * ENTRY_BYTES


def checkpoint_cost(
    model: nn.Module, job: JobConfig, world_size: int, a: Assumptions
) -> CheckpointCost:
    """Return a checkpoint's cost: bytes over what storage gives to all, or to one node, whichever
    takes longer. Reading is of every copy of the model, and of .metadata on every rank.
    """
    total, metadata = saved_bytes(model, job, world_size)
    shard_size = min(job.parallel.fsdp_shard_size or world_size, world_size)
    replicas, nodes = world_size // shard_size, math.ceil(world_size / a.gpus_per_node)
    whole_model = 0 if job.model.train_from_scratch else num_bytes(model.parameters())

    def seconds(volume: float) -> float:
        everyone, one = a.storage_gb_s, a.storage_node_gb_s
        return max(volume / (everyone * GB), volume / nodes / (one * GB))

    return CheckpointCost(
        total=total,
        per_rank=total / shard_size,
        metadata=metadata,
        staging=total / shard_size / (a.host_copy_gb_s * GB),
        save=seconds(total),
        load=seconds(total * replicas + metadata * (world_size - replicas)),
        model_load=seconds(whole_model * replicas),
    )
