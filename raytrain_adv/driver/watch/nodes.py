"""Report nodes that are lost or that join while the workers train; Ray does not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from ray.exceptions import RayError

from raytrain_adv.driver.cluster.nodes import Node, Placement, alive_nodes
from raytrain_adv.driver.watch.polling import poll
from raytrain_adv.text import plural

EVERY_S = 1.0


class NodeWatch:
    """Watches on a thread of the driver the nodes where workers may run.

    Args:
        placement: each worker's resources, and the nodes to avoid.
        nodes: id -> node, as they are now.
        say: prints a sentence.
    """

    def __init__(
        self, placement: Placement, nodes: Mapping[str, Node], say: Callable[[str], None]
    ) -> None:
        self._placement = placement
        self._say = say
        self._known = nodes

    def watching(self) -> AbstractContextManager[None]:
        """Report changes while the block runs."""
        return poll("node watch", self._check, EVERY_S)

    def _check(self) -> None:
        # If the head does not answer, HeadWatch ends the run.
        with contextlib.suppress(RayError):
            self.compare(usable_nodes(self._placement))

    def compare(self, now: Mapping[str, Node]) -> None:
        """Report how these nodes, by their ids, differ from those of the last call."""
        lost = [node.address for key, node in self._known.items() if key not in now]
        joined = [node.address for key, node in now.items() if key not in self._known]
        self._known = now
        room = sum(node.num_fitting(self._placement.bundle) for node in now.values())
        workers = plural(room, "worker")
        if room < self._placement.fewest:
            workers += f", the run waits for {self._placement.fewest}"
        for address in lost:
            self._say(f"node {address} was lost; the remaining nodes fit {workers}")
        for address in joined:
            self._say(f"node {address} has joined; there is room for {workers}")


def usable_nodes(placement: Placement) -> dict[str, Node]:
    """Return id -> node for each alive node where workers may run."""
    return {
        node.node_id: node
        for node in alive_nodes()
        if node.num_fitting(placement.bundle) and node.node_id not in placement.avoided
    }
