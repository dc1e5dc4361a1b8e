"""Compare the memory that a run needs on GPUs and hosts with what preflight found on the nodes."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from raytrain_adv.config.job import JobConfig
from raytrain_adv.driver.plan.plan import RunPlan
from raytrain_adv.driver.preflight.verdicts import Preflight, Verdict
from raytrain_adv.errors import ClusterError
from raytrain_adv.estimate.memory import RESERVE, HostNeed
from raytrain_adv.text import GIB, plural


def refuse_too_large(job: JobConfig, plan: RunPlan, found: Preflight) -> list[str]:
    """Raise ClusterError if a job does not fit GPUs or hosts, unless force; return warnings."""
    if not found.use_gpu:
        return []  # a CPU worker's memory is not predicted as a whole
    return [*_check_gpus(job, plan, found), *_check_hosts(job, plan, found)]


def _check_gpus(job: JobConfig, plan: RunPlan, found: Preflight) -> list[str]:
    facts = found.facts
    if facts is None:
        return []
    need, have = plan.memory.total, facts.device_memory_gib
    text = f"predicted peak {need:.1f} GiB per GPU (at: {plan.memory.peak})"
    if not plan.memory.fits(have):
        if job.ray.force:
            return [f"{text} on {have:.1f} GiB; started because of force: true"]
        advice = [a.sentence() for of_gpu in plan.advice.values() for a in of_gpu]
        fixes = ["set one of:", *advice] if advice else []
        raise ClusterError(
            "The job will not fit its GPUs",
            f"{text}\n{facts.describe()}; {RESERVE:.0%} of it is left to CUDA and fragmentation",
            "\n".join([*fixes, "or force: true to start anyway"]),
        )
    return [
        f"node {v.node.address}: {gpu.free_bytes / GIB:.1f} GiB are free of "
        f"{gpu.total_bytes / GIB:.1f} on a {gpu.name}; {text}: something else uses the memory now"
        for v in found.accepted
        if v.probed is not None
        for gpu in v.probed.gpus
        if not plan.memory.fits(gpu.free_bytes / GIB)
    ]


@dataclass(frozen=True)
class _Host:
    address: str
    need: HostNeed
    total_gib: float
    free_gib: float


def _check_hosts(job: JobConfig, plan: RunPlan, found: Preflight) -> list[str]:
    hosts = list(_hosts(job, plan, found))
    if of := _worst(hosts, lambda host: host.need.per_node - host.total_gib):
        host, text, more = of
        text = f"{text}, and it has {host.total_gib:.1f} GiB{more}"
        if job.ray.force:
            return [f"{text}; started because of force: true"]
        fix = "\n".join(_fixes(job, host.need))
        raise ClusterError("The job will not fit its nodes' host memory", text, fix)
    if of := _worst(hosts, lambda host: host.need.per_node - host.free_gib):
        host, text, more = of
        free = f"{host.free_gib:.1f} GiB of {host.total_gib:.1f} are free"
        return [f"{text}, and {free}: something else uses the memory now{more}"]
    if of := _worst(hosts, lambda host: host.need.least_free_to_lock - host.free_gib):
        host, text, more = of
        return [
            f"{text}; that is more than half of the {host.free_gib:.1f} GiB that are free, so "
            f"copies of checkpoints are not page-locked, and steps wait longer for them{more}"
        ]
    return []


def _worst(
    hosts: Sequence[_Host], lacks: Callable[[_Host], float]
) -> tuple[_Host, str, str] | None:
    """Return the host that lacks the most, its need, and how many others lack some."""
    short = [host for host in hosts if lacks(host) > 0]
    if not short:
        return None
    worst, others = max(short, key=lacks), len(short) - 1
    more = f"; likewise on {plural(others, 'other node')}" if others else ""
    return worst, f"node {worst.address}: {worst.need.sentence()}", more


def _hosts(job: JobConfig, plan: RunPlan, found: Preflight) -> Iterator[_Host]:
    for v in found.accepted:
        if v.probed is not None and v.probed.host_memory_bytes:
            need = HostNeed.of(plan.memory, workers_on(v, job, plan.world_size, found))
            total, free = v.probed.host_memory_bytes, v.probed.host_free_bytes
            yield _Host(v.node.address, need, total / GIB, (free or total) / GIB)


def workers_on(verdict: Verdict, job: JobConfig, world_size: int, found: Preflight) -> int:
    """Return the most workers that a node may get: Ray fills nodes unless the strategy spreads."""
    nodes = sum(v.node.count for v in found.accepted)
    most = {"STRICT_SPREAD": 1, "SPREAD": math.ceil(world_size / nodes)}
    return min(verdict.workers, most.get(job.ray.placement_strategy, world_size))


def _fixes(job: JobConfig, need: HostNeed) -> Iterator[str]:
    yield "set one of:"
    if need.kept + need.new and not job.output.save_only_model:
        yield "save_only_model: true, which leaves the optimizer's states out of checkpoints"
    if need.activations:
        each = "each layer less needs that much less host memory, and more of the GPU's"
        yield f"activation_offloading: a smaller number of layers; {each}"
    if job.parallel.fsdp_cpu_offload:
        yield "fsdp_cpu_offload: false"
    yield "ray_num_workers: more, on more nodes, so that each worker's shard is smaller"
    yield "or force: true to start anyway"
