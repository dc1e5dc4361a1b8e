"""Says which nodes are lost while the workers train, and which come: Ray tells nobody."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from ray.exceptions import RayError

from raytrain_adv.driver.cluster import connect
from raytrain_adv.driver.cluster.connect import Node
from raytrain_adv.driver.cluster.placement import Placement
from raytrain_adv.driver.watch.polling import looking
from raytrain_adv.text import plural

EVERY_S = 1.0


class NodeWatch:
    """Watches, on a thread of the driver, the nodes that workers may be on.

    Args:
        placement: what each worker needs, and which nodes must not be used.
        nodes: id -> each node that there is.
        say: takes each sentence.
    """

    def __init__(
        self, placement: Placement, nodes: Mapping[str, Node], say: Callable[[str], None]
    ) -> None:
        self._placement = placement
        self._say = say
        self._seen = nodes

    def watching(self) -> AbstractContextManager[None]:
        """Say what changes for as long as the block runs."""
        return looking("node watch", self._look, EVERY_S)

    def _look(self) -> None:
        # Where the head does not answer, head_watch ends the run.
        with contextlib.suppress(RayError):
            self.look(usable(self._placement))

    def look(self, now: Mapping[str, Node]) -> None:
        """Say how these nodes, by their ids, differ from those seen last."""
        gone = [node.address for key, node in self._seen.items() if key not in now]
        come = [node.address for key, node in now.items() if key not in self._seen]
        self._seen = now
        room = sum(node.holds(self._placement.bundle) for node in now.values())
        workers = plural(room, "worker")
        if room < self._placement.fewest:
            workers += f", the run waits for {self._placement.fewest}"
        for address in gone:
            self._say(f"node {address} was lost; what is left holds {workers}")
        for address in come:
            self._say(f"node {address} has joined; there is room for {workers}")


def usable(placement: Placement) -> dict[str, Node]:
    """Return id -> each node that is alive and that workers may be on."""
    return {
        node.node_id: node
        for node in connect.nodes()
        if node.holds(placement.bundle) and node.node_id not in placement.avoided
    }
