"""Host memory that a run takes, held against what preflight found on the nodes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from raytrain_adv.config.job import JobConfig
from raytrain_adv.driver.plan.plan import RunPlan
from raytrain_adv.driver.preflight.verdicts import Preflight, Verdict
from raytrain_adv.errors import ClusterError
from raytrain_adv.estimate.host import HostNeed
from raytrain_adv.text import GIB, plural


def refuse_too_large(job: JobConfig, plan: RunPlan, found: Preflight) -> list[str]:
    """Refuse a job whose workers on a node would take more host memory than it has; return
    warnings.

    Raises:
        ClusterError: naming the node and what takes less, unless the job says force: true.
    """
    if not found.use_gpu:
        return []  # a CPU worker's memory is not predicted as a whole
    of_nodes = list(_of_nodes(job, plan, found))
    short = [node for node in of_nodes if node.need.per_node > node.has_gib]
    if not short:
        return list(_warnings(of_nodes))
    first = max(short, key=lambda node: node.need.per_node - node.has_gib)
    text = f"{first.sentence()}, and it has {first.has_gib:.1f} GiB{_more(short)}"
    if job.ray.force:
        return [f"{text}; started because of force: true"]
    raise ClusterError(
        "The job will not fit its nodes' host memory", text, "\n".join(_fixes(job, first.need))
    )


@dataclass(frozen=True)
class _OfNode:
    address: str
    need: HostNeed
    has_gib: float
    free_gib: float

    def sentence(self) -> str:
        return f"node {self.address}: {self.need.sentence()}"


def _of_nodes(job: JobConfig, plan: RunPlan, found: Preflight) -> Iterator[_OfNode]:
    for v in found.accepted:
        if v.probed is not None and v.probed.host_memory_bytes:
            need = HostNeed.of(plan.memory, workers_on(v, job, plan.world_size, found))
            has, free = v.probed.host_memory_bytes, v.probed.host_free_bytes
            yield _OfNode(v.node.address, need, has / GIB, (free or has) / GIB)


def workers_on(verdict: Verdict, job: JobConfig, world_size: int, found: Preflight) -> int:
    """Return the workers that a node may get, at most: Ray fills nodes, unless told to spread."""
    nodes = sum(v.node.count for v in found.accepted)
    most = {"STRICT_SPREAD": 1, "SPREAD": math.ceil(world_size / nodes)}
    return min(verdict.workers, most.get(job.ray.placement_strategy, world_size))


def _warnings(of_nodes: Sequence[_OfNode]) -> Iterator[str]:
    """Yield a sentence on the worst of the nodes that have too little memory free now."""
    short = [node for node in of_nodes if node.need.per_node > node.free_gib]
    unlocked = [node for node in of_nodes if node.need.least_free_to_lock > node.free_gib]
    if short:
        first = max(short, key=lambda node: node.need.per_node - node.free_gib)
        yield (
            f"{first.sentence()}, and {first.free_gib:.1f} GiB of {first.has_gib:.1f} are free: "
            f"something else holds the memory now{_more(short)}"
        )
    elif unlocked:
        first = max(unlocked, key=lambda node: node.need.least_free_to_lock - node.free_gib)
        yield (
            f"{first.sentence()}; that is more than half of the {first.free_gib:.1f} GiB that are "
            "free, so that copies of checkpoints are not page-locked, and steps wait longer for "
            f"them{_more(unlocked)}"
        )


def _more(nodes: Sequence[_OfNode]) -> str:
    return f"; and so on {plural(len(nodes) - 1, 'other node')}" if len(nodes) > 1 else ""


def _fixes(job: JobConfig, need: HostNeed) -> Iterator[str]:
    yield "set one of:"
    if need.kept + need.new and not job.output.save_only_model:
        yield "save_only_model: true, which leaves the optimizer's states out of checkpoints"
    if job.parallel.fsdp_cpu_offload:
        yield "fsdp_cpu_offload: false"
    yield "ray_num_workers: more, on more nodes, so that each worker's shard is smaller"
    yield "or force: true to start anyway"
