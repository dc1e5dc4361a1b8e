"""The number of workers as nodes come and go: fewer at once, more after the next checkpoint."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ScalingDecision,
)

from raytrain_adv.driver.cluster import nodes
from raytrain_adv.driver.cluster.nodes import Node, Placement


class BatchPreservingPolicy(ElasticScalingPolicy):  # type: ignore[misc] # ray is Any to mypy
    """Ray Train's elastic policy for a number of workers that has to divide the batch, and for
    clusters where some nodes are unusable. Runs in Ray Train's controller.

    Ray's own policy counts nodes that its label selector excludes and those that other jobs use,
    requests that many workers, waits in vain, and requests again (ray 2.60, elastic.py). It also
    grows by ending the workers at any step, so that the steps since the last checkpoint are lost.
    """

    def __init__(self, config: ScalingConfig, placement: Placement, strategy: str) -> None:
        super().__init__(config)
        self._placement = placement
        self._strategy = strategy
        self._own: Counter[str] = Counter()  # node id -> this run's workers: free at the next start

    def before_controller_execute_resize_decision(self, decision: Any) -> None:
        """Forget the current workers: they have ended when the next ones are counted."""
        self._own.clear()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Grow if there is room and a checkpoint has just been written."""
        self._maybe_send_resource_request()
        workers = worker_group_state.workers
        self._own = Counter(worker.metadata.node_id for worker in workers)
        reports = (s.training_report for s in worker_group_status.worker_statuses.values())
        if not any(report is not None and report.checkpoint is not None for report in reports):
            return NoopDecision()
        possible = self._count_possible_workers({})
        if possible <= len(workers):
            return NoopDecision()
        return self._get_resize_decision(possible)

    def _get_reserved_resources(self) -> dict[str, dict[str, float]]:
        """Return nothing: _count_possible_workers reads the free resources itself."""
        return {}

    def _count_possible_workers(self, reserved_resources: Mapping[str, Any]) -> int:
        return largest_fitting(self._free(), self._placement, self._strategy)

    def _free(self) -> list[Node]:
        """Return the usable nodes, each with its resources that are free or this run's own."""
        free, place = nodes.free_by_node(), self._placement
        found = []
        for node in nodes.alive_nodes():
            unwanted = node.accelerator in place.avoided_accelerators
            if unwanted or node.is_draining or node.node_id in place.avoided:
                continue
            own, there = self._own[node.node_id], free.get(node.node_id, {})
            room = {name: there.get(name, 0.0) + own * n for name, n in place.bundle.items()}
            found.append(Node(node.address, room, node_id=node.node_id))
        return found


def largest_fitting(free: Sequence[Node], placement: Placement, strategy: str) -> int:
    """Return the largest allowed number of workers that fits into free resources; else 0."""
    room = nodes.num_fitting(free, placement, strategy)
    return max((number for number in placement.numbers if number <= room), default=0)
