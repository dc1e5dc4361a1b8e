"""How many workers run as nodes come and go: fewer at once, more after the next checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ScalingDecision,
)

from raytrain_adv.driver.cluster import connect
from raytrain_adv.driver.cluster.connect import Node
from raytrain_adv.driver.cluster.placement import Placement


class KeepsTheBatch(ElasticScalingPolicy):  # type: ignore[misc] # ray is Any to mypy
    """Ray Train's elastic policy where a number of workers has to divide the batch, and not every
    node will do. Runs in Ray Train's controller.

    Ray's own counts nodes that its label selector excludes and those that other jobs hold, asks
    for as many workers, waits in vain, and asks again (ray 2.60, elastic.py); and it grows by
    ending the workers wherever they are, so that the steps since the last checkpoint are lost.
    """

    def __init__(self, config: ScalingConfig, placement: Placement, strategy: str) -> None:
        super().__init__(config)
        self._placement = placement
        self._strategy = strategy
        self._held: Counter[str] = Counter()
        """Node id -> this run's workers on it, which are not free and yet can be had."""

    def before_controller_execute_resize_decision(self, decision: Any) -> None:
        """Note that the workers there are will have gone when the next ones are counted."""
        self._held.clear()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Grow where there is room, once a checkpoint has just been written."""
        self._maybe_send_resource_request()
        workers = worker_group_state.workers
        self._held = Counter(worker.metadata.node_id for worker in workers)
        told = (s.training_report for s in worker_group_status.worker_statuses.values())
        if not any(report is not None and report.checkpoint is not None for report in told):
            return NoopDecision()
        possible = self._count_possible_workers({})
        if possible <= len(workers):
            return NoopDecision()
        return self._get_resize_decision(possible)

    def _get_reserved_resources(self) -> dict[str, dict[str, float]]:
        """Return nothing: what is free is asked where workers are counted."""
        return {}

    def _count_possible_workers(self, reserved_resources: Mapping[str, Any]) -> int:
        """Return the largest number that will do and that there is room for; 0 if none."""
        return fitting(self._free(), self._placement, self._strategy)

    def _free(self) -> list[Node]:
        """Return the nodes that may be used, each with what is free or this run's own there."""
        free = connect.free_on_nodes()
        bundle = self._placement.bundle
        return [
            Node(
                node.address,
                {
                    name: free.get(node.node_id, {}).get(name, 0.0)
                    + self._held[node.node_id] * amount
                    for name, amount in bundle.items()
                },
                node_id=node.node_id,
            )
            for node in connect.nodes()
            if self._may_use(node)
        ]

    def _may_use(self, node: Node) -> bool:
        return not (
            node.is_draining
            or node.node_id in self._placement.avoided
            or node.accelerator in self._placement.avoided_accelerators
        )


def fitting(free: Sequence[Node], placement: Placement, strategy: str) -> int:
    """Return the largest number of workers that will do and that there is room for; 0 if none.

    Args:
        free: nodes that may be used, each with the resources that can be had there.
        placement: what each worker needs, and the numbers that will do.
        strategy: how workers are laid over nodes.
    """
    room = connect.room(free, placement, strategy)
    return max((number for number in placement.numbers if number <= room), default=0)
