"""The cluster is checked before anything is scheduled: which nodes can run the job, and which are
left out, with the rule that refused.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from raytrain_adv.config.job import JobConfig
from raytrain_adv.driver.cluster import connect
from raytrain_adv.driver.cluster.connect import Node
from raytrain_adv.driver.cluster.placement import Placement
from raytrain_adv.driver.plan.plan import RunPlan
from raytrain_adv.driver.preflight import versions
from raytrain_adv.driver.preflight.accelerators import declared_reading
from raytrain_adv.driver.preflight.probe import Read, Reading, read_nodes
from raytrain_adv.driver.preflight.probe_script import own_package
from raytrain_adv.errors import ClusterError, RaytrainAdvError
from raytrain_adv.estimate.memory import RESERVE
from raytrain_adv.hardware import HardwareFacts
from raytrain_adv.text import GIB

NEEDED = ("raytrain_adv", "torch", "transformers")
"""Packages without which no worker starts."""
NO_ROOM = "has no room for a worker"
DIFFERS = "Versions differ between the nodes"


class Rule(Protocol):
    """What a transform has to say about a machine."""

    def check(self, facts: HardwareFacts) -> None:
        """Raise if the machine will not do."""


@dataclass(frozen=True)
class Verdict:
    """What was found on a node, and whether the job can run there."""

    node: Node
    reading: Reading | None
    """None where the node did not answer, or is yet to start and names no GPU that is known."""
    workers: int
    """Workers it has room for, used or not."""
    refusal: str = ""
    """The rule that refused, in a line; empty where none did."""
    found: str = ""
    fix: str = ""

    @property
    def accepted(self) -> bool:
        """Whether workers may be placed here."""
        return self.workers > 0 and not self.refusal

    @property
    def probed(self) -> Reading | None:
        """What the node itself said; none where it did not, or is yet to start."""
        return None if self.reading is None or self.reading.is_declared else self.reading

    @property
    def reason(self) -> str:
        """Why no worker may be placed here; empty where one may be."""
        return self.refusal or ("" if self.workers else NO_ROOM)


@dataclass(frozen=True)
class Preflight:
    """The verdicts on all nodes of a cluster."""

    verdicts: tuple[Verdict, ...]
    use_gpu: bool
    """Whether workers compute on GPUs."""
    seconds: float
    """How long the nodes took to answer."""
    warnings: tuple[str, ...] = ()

    @property
    def accepted(self) -> tuple[Verdict, ...]:
        """The nodes that workers may be placed on."""
        return tuple(v for v in self.verdicts if v.accepted)

    @property
    def facts(self) -> HardwareFacts | None:
        """The smallest GPU (or host) that a worker may get; none where nothing is known."""
        found = [
            facts
            for verdict in self.accepted
            if verdict.reading is not None
            for facts in verdict.reading.facts(verdict.node.address, self.use_gpu)
        ]
        return min(found, key=lambda facts: facts.device_memory_bytes, default=None)


def look_at(placement: Placement, rules: Sequence[Rule], read: Read = read_nodes) -> Preflight:
    """Probe every node that is alive and judge it; judge those yet to start by what they declare.

    Args:
        placement: what is asked of the cluster.
        rules: the job's enabled transforms.
        read: gives the nodes' readings.
    """
    alive, start = connect.nodes(), time.perf_counter()
    answers = read(alive)
    seconds = time.perf_counter() - start
    verdicts = [
        judged(placement, rules, node, answers.get(node.node_id, "it was not asked"))
        for node in alive
    ]
    for node in connect.scalable_nodes():
        if node.count and node.holds(placement.bundle):
            num_gpus = int(node.resources.get("GPU", 0))
            reading = declared_reading(node.accelerator, num_gpus)
            verdicts.append(judged(placement, rules, node, reading))
    return compared(verdicts, placement.use_gpu, seconds)


def compared(verdicts: Sequence[Verdict], use_gpu: bool, seconds: float = 0.0) -> Preflight:
    """Return what was found once nodes are left out whose versions differ from most."""
    verdicts = _of_one_version(verdicts)
    sentences = versions.spread(
        [
            (v.node.address, _of_little_weight(v.probed))
            for v in verdicts
            if v.accepted and v.probed is not None
        ]
    )
    return Preflight(tuple(verdicts), use_gpu, seconds, tuple(sentences))


def judged(
    placement: Placement, rules: Sequence[Rule], node: Node, answer: Reading | str | None
) -> Verdict:
    """Return the verdict on one node.

    Args:
        placement: what is asked of the cluster.
        rules: the job's enabled transforms.
        node: the node.
        answer: its reading; a sentence where it did not answer; none where nothing is known of it.
    """
    room = node.holds(placement.bundle)
    if isinstance(answer, str):
        fix = "see whether the node is up (ray status), or take it out of the cluster"
        return Verdict(node, None, room, "The node did not answer the probe", answer, fix)
    if answer is None or not room:
        return Verdict(node, answer, room)
    if node.is_draining:
        found = f"node {node.address}: Ray takes it out of the cluster"
        return Verdict(node, answer, room, "The node is being drained", found, "add a node for it")
    try:
        refuse_unusable(placement, node, answer)
        for facts in answer.facts(node.address, placement.use_gpu):
            for rule in rules:
                rule.check(facts)
    except RaytrainAdvError as error:
        return Verdict(node, answer, room, error.what, error.found, error.fix)
    return Verdict(node, answer, room)


def refuse_unusable(placement: Placement, node: Node, reading: Reading) -> None:
    """Refuse a node on which no job of this shape can run.

    Raises:
        ClusterError: naming what is missing on it.
    """
    if reading.is_declared:
        return
    missing = [name for name in NEEDED if reading.versions.get(name) is None]
    if missing:
        names = " and ".join(missing)
        raise ClusterError(
            f"{names} not available",
            f"node {node.address}: not installed for Python {reading.versions.get('python')}",
            f"install {names} there; {versions.IMAGE}",
        )
    version, code = _own_package()
    here = {"raytrain_adv": version, versions.CODE: code}
    there = {"raytrain_adv": reading.versions["raytrain_adv"], versions.CODE: reading.code or code}
    if here != there:
        raise ClusterError(
            "raytrain_adv is another one than the driver's",
            f"node {node.address}: " + versions.difference(there, here),
            "send the driver's with the job: ray job submit --working-dir .",
        )
    if not placement.use_gpu:
        return
    if not reading.gpus:
        gpus = node.resources.get("GPU", 0.0)
        raise ClusterError(
            "No GPU is found on a node that declares some",
            f"node {node.address}: {gpus:g} GPU in Ray; {reading.gpu_error or 'NVML sees none'}",
            "check nvidia-smi there, and that the container was given its GPUs",
        )
    if placement.num_workers > 1 and any(gpu.is_mig for gpu in reading.gpus):
        raise ClusterError(
            "MIG slices cannot train together: NCCL needs whole GPUs",
            f"node {node.address}: {reading.gpus[0].name}",
            "turn MIG off there (nvidia-smi -mig 0), or set ray_num_workers: 1",
        )


@functools.cache
def _own_package() -> tuple[str | None, str | None]:
    return own_package()  # reads every file: once, not for every node


def settled(job: JobConfig, placement: Placement, found: Preflight) -> Placement:
    """Return the placement on the nodes that qualify; `auto` workers become those there is room
    for.

    Raises:
        ClusterError: when they are too few, with the numbers and each refusal.
    """
    auto = job.ray.ray_num_workers == "auto" and placement.use_gpu
    nodes = [v.node for v in found.accepted]
    num_workers = sum(v.workers * v.node.count for v in found.accepted) if auto else 0
    num_workers = num_workers or placement.num_workers
    wanted = dataclasses.replace(placement, num_workers=num_workers)
    room = connect.room(nodes, wanted, job.ray.placement_strategy)
    refused = [v for v in found.verdicts if v.workers and v.refusal]
    if auto:
        # auto asks for every GPU: one is not passed over for an odd version, which can be mended
        refused = [v for v in refused if v.refusal == DIFFERS] or refused
    if room < wanted.fewest or (auto and any(v.refusal == DIFFERS for v in refused)):
        raise _too_few(job, placement, refused, room)
    left_out = [v.node for v in found.verdicts if v.workers and not v.accepted]
    wanted_types = {node.accelerator for node in nodes}
    probed = [v.probed for v in found.accepted if v.probed is not None]
    return dataclasses.replace(
        wanted,
        note=connect.note(job, num_workers, placement.bundle),
        avoided=tuple(node.node_id for node in left_out if node.node_id),
        avoided_accelerators=tuple(
            sorted(
                {n.accelerator for n in left_out if not n.node_id and n.accelerator} - wanted_types
            )
        ),
        versions=versions.decisive(probed[0].versions) if probed else {},
    )


def _too_few(
    job: JobConfig, placement: Placement, refused: Sequence[Verdict], room: int
) -> ClusterError:
    rules = list(dict.fromkeys(v.refusal for v in refused))
    bundle = ", ".join(f"{amount:g} {name}" for name, amount in placement.bundle.items())
    lines = [
        f"asked: {placement.asked} with {bundle} each ({job.ray.placement_strategy})",
        f"there is room for {room} on the nodes that qualify; left out:",
    ]
    for verdict in refused:
        rule = f"{verdict.refusal}: " if len(rules) > 1 else ""
        first = verdict.found.partition("\n")[0] or verdict.node.address
        place = "" if verdict.node.address in first else f"{verdict.node.address}: "
        lines.append(f"  {place}{rule}{first}")
    fixes = [*dict.fromkeys(v.fix for v in refused if v.fix)]
    if room:
        fixes.append(f"or set ray_num_workers to {room} or less")
    what = rules[0] if len(rules) == 1 else "Too few nodes can run this job"
    return ClusterError(what, "\n".join(lines), "\n".join(fixes) or "add nodes")


def _of_one_version(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Keep the nodes whose decisive versions agree, those with most room; refuse the others."""
    groups: dict[tuple[str | None, ...], list[Verdict]] = {}
    for verdict in verdicts:
        if verdict.probed is not None and verdict.accepted:
            key = (*versions.decisive(verdict.probed.versions).values(), verdict.probed.code)
            groups.setdefault(key, []).append(verdict)
    if len(groups) <= 1:
        return list(verdicts)
    kept = max(groups, key=lambda key: sum(v.workers for v in groups[key]))
    elsewhere = dict(zip((*versions.DECISIVE, versions.CODE), kept, strict=True))
    judged_again = []
    for verdict in verdicts:
        if verdict.probed is not None and verdict.accepted and verdict not in groups[kept]:
            here = {**verdict.probed.versions, versions.CODE: verdict.probed.code}
            verdict = dataclasses.replace(
                verdict,
                refusal=DIFFERS,
                found=f"node {verdict.node.address}: {versions.difference(here, elsewhere)}",
                fix=versions.IMAGE,
            )
        judged_again.append(verdict)
    return judged_again


def _of_little_weight(reading: Reading) -> dict[str, str | None]:
    others = {k: v for k, v in reading.versions.items() if k not in versions.DECISIVE}
    return {**others, "the NVIDIA driver": reading.driver_version}


def refuse_too_large(job: JobConfig, plan: RunPlan, found: Preflight) -> list[str]:
    """Refuse a job whose predicted memory is more than the smallest GPU has; return warnings.

    Raises:
        ClusterError: with the changes that would make it fit, unless the job says force: true.
    """
    facts = found.facts
    if not found.use_gpu or facts is None:
        return []
    need, have = plan.memory.total, facts.device_memory_gib
    text = f"predicted peak {need:.1f} GiB per GPU (at: {plan.memory.peak})"
    if not plan.memory.fits(have):
        if job.ray.force:
            return [f"{text} on {have:.1f} GiB; started because of force: true"]
        advice = [a.sentence() for of_gpu in plan.advice.values() for a in of_gpu]
        raise ClusterError(
            "The job will not fit its GPUs",
            f"{text}\n{facts.describe()}; {RESERVE:.0%} of it is left to CUDA and fragmentation",
            "\n".join(
                [*(["set one of:"] if advice else []), *advice, "or force: true to start anyway"]
            ),
        )
    return [
        f"node {v.node.address}: {gpu.free_bytes / GIB:.1f} GiB are free of "
        f"{gpu.total_bytes / GIB:.1f} on a {gpu.name}; {text}: something else holds the memory now"
        for v in found.accepted
        if v.probed is not None
        for gpu in v.probed.gpus
        if not plan.memory.fits(gpu.free_bytes / GIB)
    ]
