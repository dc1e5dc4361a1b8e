"""How many trials of a sweep fit on the cluster at the same time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from raytrain_adv.config.job import JobConfig
from raytrain_adv.config.sweep import Trial
from raytrain_adv.driver.cluster.nodes import Node, Placement, resolve_placement
from raytrain_adv.driver.preflight import verdicts
from raytrain_adv.driver.preflight.probe import Read
from raytrain_adv.driver.preflight.verdicts import Preflight
from raytrain_adv.errors import ClusterError
from raytrain_adv.transforms.applied import Transforms


@dataclass(frozen=True)
class Room:
    """The cluster's room for the trials."""

    at_once: int
    """Trials that fit at the same time."""
    found: Preflight
    """The nodes, as checked for the first trial that can run."""
    placement: Placement
    """That trial's placement."""


def find_room(trials: Sequence[Trial], started_here: bool, read: Read) -> Room:
    """Check each trial's placement, probing nodes once for trials with the same request.

    Raises:
        ClusterError: the first trial's error, if the cluster cannot run any of them.
    """
    outcomes: dict[str, Room | ClusterError] = {}
    for trial in trials:
        key = _request(trial.job)
        if key not in outcomes:
            try:
                outcomes[key] = _room(trial.job, started_here, read)
            except ClusterError as error:
                outcomes[key] = error
    rooms = [outcome for outcome in outcomes.values() if isinstance(outcome, Room)]
    if not rooms:
        raise next(outcome for outcome in outcomes.values() if isinstance(outcome, ClusterError))
    return Room(min(room.at_once for room in rooms), rooms[0].found, rooms[0].placement)


def _request(job: JobConfig) -> str:
    """Return everything in a job that decides where it can run."""
    ray = {k: v for k, v in job.ray.model_dump().items() if k != "ray_run_name"}
    transforms = [t.model_dump() for t in job.transforms]
    return json.dumps([ray, job.parallel.use_cpu, transforms], default=str, sort_keys=True)


def _room(job: JobConfig, started_here: bool, read: Read) -> Room:
    placement = resolve_placement(job, started_here)
    found = verdicts.check_nodes(placement, list(Transforms(job)), read)
    placement = verdicts.place(job, placement, found)
    nodes = [verdict.node for verdict in found.accepted]
    at_once = trials_at_once(nodes, placement, job.ray.placement_strategy)
    return Room(at_once, found, placement)


def trials_at_once(nodes: Sequence[Node], placement: Placement, strategy: str) -> int:
    """Return how many trials fit on these nodes at the same time; a trial's driver reserves
    nothing. At least 1: what does not fit was refused before.
    """
    fits = [node.num_fitting(placement.bundle) for node in nodes for _ in range(node.count)]
    workers = placement.num_workers
    if strategy == "STRICT_PACK":
        return max(sum(number // workers for number in fits), 1)
    if strategy == "STRICT_SPREAD":
        # Each trial takes one place on as many nodes as it has workers.
        number = 1
        while sum(min(fit, number + 1) for fit in fits) >= (number + 1) * workers:
            number += 1
        return number
    return max(sum(fits) // workers, 1)
