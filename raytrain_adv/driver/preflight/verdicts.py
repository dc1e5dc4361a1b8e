"""Check the cluster before anything is scheduled: which nodes can run the job, and why not."""

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from raytrain_adv import probe_script
from raytrain_adv.config.job import JobConfig
from raytrain_adv.driver.cluster import nodes as cluster
from raytrain_adv.driver.cluster.nodes import Node, Placement
from raytrain_adv.driver.preflight import versions
from raytrain_adv.driver.preflight.probe import Read, Reading, declared_reading, read_nodes
from raytrain_adv.errors import ClusterError, RaytrainAdvError
from raytrain_adv.hardware import HardwareFacts
from raytrain_adv.text import first_line
from raytrain_adv.transforms.transform import Transform

NEEDED = ("raytrain_adv", "torch", "transformers")  # packages that every worker needs
NO_ROOM = "has no room for a worker"
DIFFERS = "Versions differ between the nodes"

own_package = functools.cache(probe_script.own_package)  # reads every file: once, not for each node


@dataclass(frozen=True)
class Verdict:
    """What was found on a node, and whether the job can run there."""

    node: Node
    reading: Reading | None  # None without an answer, or if not started and of no known GPU
    workers: int  # workers that fit on it, used or not
    refusal: str = ""  # the violated rule in a line; empty if there is none
    found: str = ""
    fix: str = ""

    @property
    def accepted(self) -> bool:
        """Whether workers may run here."""
        return self.workers > 0 and not self.refusal

    @property
    def seen(self) -> Reading:
        """Its reading; an empty one if there is none."""
        return self.reading or Reading()

    @property
    def probed(self) -> Reading | None:
        """The probe's reading; None if the node did not answer or is not started yet."""
        return None if self.reading is None or self.reading.is_declared else self.reading

    @property
    def reason(self) -> str:
        """Why no worker may run here; empty if one may."""
        return self.refusal or ("" if self.workers else NO_ROOM)


@dataclass(frozen=True)
class Preflight:
    """The verdicts on all nodes of a cluster."""

    verdicts: tuple[Verdict, ...]
    use_gpu: bool  # whether workers compute on GPUs
    seconds: float  # time until the nodes answered
    warnings: tuple[str, ...] = ()

    @property
    def accepted(self) -> tuple[Verdict, ...]:
        """The nodes where workers may run."""
        return tuple(v for v in self.verdicts if v.accepted)

    @property
    def facts(self) -> HardwareFacts | None:
        """The smallest GPU (or host) that a worker may get; None if nothing is known."""
        found = [
            facts
            for verdict in self.accepted
            if verdict.reading is not None
            for facts in verdict.reading.facts(verdict.node.address, self.use_gpu)
        ]
        return min(found, key=lambda facts: facts.device_memory_bytes, default=None)


def check_nodes(
    placement: Placement, rules: Sequence[Transform], read: Read = read_nodes
) -> Preflight:
    """Probe and judge every alive node; judge those not started yet by what they declare."""
    alive, start = cluster.alive_nodes(), time.perf_counter()
    answers = read(alive)
    seconds = time.perf_counter() - start
    verdicts = [
        judge(placement, rules, node, answers.get(node.node_id, "it was not probed"))
        for node in alive
    ]
    for node in cluster.scalable_nodes():
        if node.count and node.num_fitting(placement.bundle):
            declared = declared_reading(node.accelerator, int(node.resources.get("GPU", 0)))
            verdicts.append(judge(placement, rules, node, declared))
    return compare_versions(verdicts, placement.use_gpu, seconds)


def compare_versions(verdicts: Sequence[Verdict], use_gpu: bool, seconds: float = 0.0) -> Preflight:
    """Refuse nodes whose decisive versions differ from most; warn of other differences."""
    verdicts = _refuse_odd_versions(verdicts)
    others = [
        (v.node.address, {**v.probed.versions, "the NVIDIA driver": v.probed.driver_version})
        for v in verdicts
        if v.accepted and v.probed is not None
    ]
    warnings = versions.describe_differences(others)
    return Preflight(tuple(verdicts), use_gpu, seconds, tuple(warnings))


def judge(
    placement: Placement, rules: Sequence[Transform], node: Node, answer: Reading | str | None
) -> Verdict:
    """Return the verdict on a node; `answer` is why it did not answer, None if nothing is known."""
    workers = node.num_fitting(placement.bundle)
    if isinstance(answer, str):
        fix = "check that the node is up (ray status), or remove it from the cluster"
        return Verdict(node, None, workers, "The node did not answer the probe", answer, fix)
    if answer is None or not workers:
        return Verdict(node, answer, workers)
    if node.is_draining:
        found = f"node {node.address}: Ray is removing it from the cluster"
        fix = "add another node"
        return Verdict(node, answer, workers, "The node is being drained", found, fix)
    try:
        _refuse_unusable(placement, node, answer)
        for facts in answer.facts(node.address, placement.use_gpu):
            for rule in rules:
                rule.check(facts)
    except RaytrainAdvError as error:
        return Verdict(node, answer, workers, error.what, error.found, error.fix)
    return Verdict(node, answer, workers)


def _refuse_unusable(placement: Placement, node: Node, reading: Reading) -> None:
    if reading.is_declared:
        return
    if names := " and ".join(name for name in NEEDED if reading.versions.get(name) is None):
        raise ClusterError(
            f"{names} not available",
            f"node {node.address}: not installed for Python {reading.versions.get('python')}",
            f"install {names} there; {versions.IMAGE}",
        )
    version, code = own_package()
    here = {"raytrain_adv": version, versions.CODE: code}
    there = {"raytrain_adv": reading.versions["raytrain_adv"], versions.CODE: reading.code or code}
    if here != there:
        raise ClusterError(
            "raytrain_adv differs from the driver's",
            f"node {node.address}: " + versions.difference(there, here),
            "send the driver's with the job: ray job submit --working-dir .",
        )
    if not placement.use_gpu:
        return
    if not reading.gpus:
        declared = f"{node.resources.get('GPU', 0.0):g} GPU in Ray"
        raise ClusterError(
            "A node declares GPUs, and none is found on it",
            f"node {node.address}: {declared}; {reading.gpu_error or 'NVML finds none'}",
            "check nvidia-smi there, and that the container has access to the GPUs",
        )
    if placement.num_workers > 1 and any(gpu.is_mig for gpu in reading.gpus):
        raise ClusterError(
            "MIG slices cannot train together: NCCL needs whole GPUs",
            f"node {node.address}: {reading.gpus[0].name}",
            "turn MIG off there (nvidia-smi -mig 0), or set ray_num_workers: 1",
        )


def place(job: JobConfig, placement: Placement, found: Preflight) -> Placement:
    """Return the placement on the accepted nodes, `auto` resolved. Raises ClusterError."""
    auto = job.ray.ray_num_workers == "auto" and placement.use_gpu
    nodes = [v.node for v in found.accepted]
    all_gpus = sum(v.workers * v.node.count for v in found.accepted) if auto else 0
    wanted = replace(placement, num_workers=all_gpus or placement.num_workers)
    room = cluster.num_fitting(nodes, wanted, job.ray.placement_strategy)
    refused = [v for v in found.verdicts if v.workers and v.refusal]
    odd = [v for v in refused if v.refusal == DIFFERS]
    # auto means every GPU: one is not skipped because of an odd version, which can be fixed.
    if room < wanted.fewest or (auto and odd):
        raise _too_few(job, placement, (odd if auto else []) or refused, room)
    left_out = [v.node for v in found.verdicts if v.workers and not v.accepted]
    types = {n.accelerator for n in left_out if not n.node_id and n.accelerator}
    probed = [v.probed for v in found.accepted if v.probed is not None]
    return replace(
        wanted,
        note=cluster.describe_request(job, wanted.num_workers, placement.bundle),
        avoided=tuple(node.node_id for node in left_out if node.node_id),
        avoided_accelerators=tuple(sorted(types - {node.accelerator for node in nodes})),
        versions=versions.decisive(probed[0].versions) if probed else {},
    )


def _too_few(
    job: JobConfig, placement: Placement, refused: Sequence[Verdict], room: int
) -> ClusterError:
    rules = list(dict.fromkeys(v.refusal for v in refused))
    lines = [placement.request(job.ray.placement_strategy)]
    lines.append(f"there is room for {room} on the accepted nodes; excluded:")
    for verdict in refused:
        first = first_line(verdict.found or verdict.node.address)
        place = "" if verdict.node.address in first else f"{verdict.node.address}: "
        lines.append(f"  {place}{f'{verdict.refusal}: ' if len(rules) > 1 else ''}{first}")
    fixes = [*dict.fromkeys(v.fix for v in refused if v.fix)]
    if room:
        fixes.append(f"or set ray_num_workers to {room} or less")
    what = rules[0] if len(rules) == 1 else "Too few nodes can run this job"
    return ClusterError(what, "\n".join(lines), "\n".join(fixes) or "add nodes")


def _refuse_odd_versions(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Keep the nodes whose decisive versions agree and fit most workers; refuse the others."""
    groups: dict[tuple[str | None, ...], list[Verdict]] = {}
    for verdict in verdicts:
        if verdict.probed is not None and verdict.accepted:
            key = (*versions.decisive(verdict.probed.versions).values(), verdict.probed.code)
            groups.setdefault(key, []).append(verdict)
    if len(groups) <= 1:
        return list(verdicts)
    kept = max(groups, key=lambda key: sum(v.workers for v in groups[key]))
    elsewhere = dict(zip((*versions.DECISIVE, versions.CODE), kept, strict=True))
    judged = []
    for verdict in verdicts:
        if verdict.probed is not None and verdict.accepted and verdict not in groups[kept]:
            here = {**verdict.probed.versions, versions.CODE: verdict.probed.code}
            differs = f"node {verdict.node.address}: {versions.difference(here, elsewhere)}"
            verdict = replace(verdict, refusal=DIFFERS, found=differs, fix=versions.IMAGE)
        judged.append(verdict)
    return judged
