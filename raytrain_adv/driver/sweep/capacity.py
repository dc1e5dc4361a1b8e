"""How many trials of a sweep the cluster holds at the same time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from raytrain_adv.config.job import JobConfig
from raytrain_adv.config.sweep import Trial
from raytrain_adv.driver.cluster import connect
from raytrain_adv.driver.cluster.connect import Node
from raytrain_adv.driver.cluster.placement import Placement
from raytrain_adv.driver.preflight import verdicts
from raytrain_adv.driver.preflight.probe import Read
from raytrain_adv.driver.preflight.verdicts import Preflight
from raytrain_adv.errors import ClusterError
from raytrain_adv.transforms.applied import Transforms


@dataclass(frozen=True)
class Room:
    """What was found on the cluster before the first trial."""

    at_once: int
    """Trials that it holds at the same time."""
    found: Preflight
    """The nodes, as the first trial that can run sees them."""
    placement: Placement
    """That trial's."""
    refused: tuple[str, ...]
    """Names of the trials that the cluster cannot run."""


def look_at(trials: Sequence[Trial], started_here: bool, read: Read) -> Room:
    """Settle each trial's placement, probing nodes once for those that ask for the same.

    Raises:
        ClusterError: when the cluster cannot run any of them; the first one's error.
    """
    seen: dict[str, tuple[int, Preflight, Placement] | ClusterError] = {}
    refused: list[str] = []
    errors: list[ClusterError] = []
    rooms: list[tuple[int, Preflight, Placement]] = []
    for trial in trials:
        key = _asked(trial.job)
        if key not in seen:
            try:
                seen[key] = _room(trial.job, started_here, read)
            except ClusterError as error:
                seen[key] = error
        outcome = seen[key]
        if isinstance(outcome, ClusterError):
            refused.append(trial.name)
            errors.append(outcome)
        else:
            rooms.append(outcome)
    if not rooms:
        raise errors[0]
    _, found, placement = rooms[0]
    return Room(min(number for number, _, _ in rooms), found, placement, tuple(refused))


def _asked(job: JobConfig) -> str:
    """Return all of a job that decides where it can run."""
    ray = {k: v for k, v in job.ray.model_dump().items() if k != "ray_run_name"}
    transforms = [t.model_dump() for t in job.transforms]
    return json.dumps([ray, job.parallel.use_cpu, transforms], default=str, sort_keys=True)


def _room(job: JobConfig, started_here: bool, read: Read) -> tuple[int, Preflight, Placement]:
    placement = connect.settle(job, started_here)
    found = verdicts.look_at(placement, list(Transforms(job)), read)
    placement = verdicts.settled(job, placement, found)
    nodes = [verdict.node for verdict in found.accepted]
    return trials_at_once(nodes, placement, job.ray.placement_strategy), found, placement


def trials_at_once(nodes: Sequence[Node], placement: Placement, strategy: str) -> int:
    """Return how many times these nodes hold all workers of a placement at the same time; a trial's
    driver reserves nothing beside them. At least 1: what does not fit was refused before.
    """
    holds = [node.holds(placement.bundle) for node in nodes for _ in range(node.count)]
    workers = placement.num_workers
    if strategy == "STRICT_PACK":
        return max(sum(number // workers for number in holds), 1)
    if strategy == "STRICT_SPREAD":
        # Each trial takes one place on each of as many nodes as it has workers.
        number = 1
        while sum(min(h, number + 1) for h in holds) >= (number + 1) * workers:
            number += 1
        return number
    return max(sum(holds) // workers, 1)
