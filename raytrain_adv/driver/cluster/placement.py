"""The resources that a job requests from the cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from raytrain_adv.text import plural


@dataclass(frozen=True)
class Placement:
    """The resources that a job requests from the cluster, with every auto resolved."""

    num_workers: int
    """Number of workers; the largest one if it may change."""
    bundle: dict[str, float]
    """What each worker reserves."""
    use_gpu: bool
    started_here: bool
    """Whether this driver started the cluster."""
    note: str
    """The request in a sentence, for the console."""
    avoided: tuple[str, ...] = ()
    """Ids of the nodes that preflight excluded."""
    avoided_accelerators: tuple[str, ...] = ()
    """Ray's accelerator types that an autoscaler must not start for this job."""
    numbers: tuple[int, ...] = ()
    """The allowed numbers of workers, ascending; empty if the number is fixed."""
    versions: Mapping[str, str | None] = field(default_factory=dict)
    """Package -> version on the nodes that preflight accepted; each worker compares its own."""

    @property
    def fewest(self) -> int:
        """The fewest workers with which the run continues."""
        return self.numbers[0] if self.numbers else self.num_workers

    def request(self, strategy: str) -> str:
        """Return the requested workers and their resources, for an error's text."""
        each = ", ".join(f"{amount:g} {name}" for name, amount in self.bundle.items())
        elastic = f"{self.fewest} workers at least"
        workers = elastic if self.numbers else plural(self.num_workers, "worker")
        return f"requested: {workers} with {each} each ({strategy})"

    @property
    def label_selector(self) -> dict[str, str] | None:
        """The nodes where workers may run, in Ray's terms; None means any.

        Unusable nodes are excluded rather than usable ones listed, so that a node that joins later
        may be used: each worker checks its own node before it starts.
        """
        unwanted = {
            "ray.io/node-id": self.avoided,
            "ray.io/accelerator-type": self.avoided_accelerators,
        }
        return {key: f"!in({','.join(v)})" for key, v in unwanted.items() if v} or None
