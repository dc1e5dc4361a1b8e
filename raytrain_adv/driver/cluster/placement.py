"""What a job will ask of the cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from raytrain_adv.text import plural


@dataclass(frozen=True)
class Placement:
    """What the job will ask of the cluster, with every auto resolved."""

    num_workers: int
    """Where their number may change, the most there may be."""
    bundle: dict[str, float]
    """What each worker reserves."""
    use_gpu: bool
    started_here: bool
    """Whether this driver started the cluster."""
    note: str
    """The choice in a sentence, for the console."""
    avoided: tuple[str, ...] = ()
    """Ids of the nodes that preflight left out."""
    avoided_accelerators: tuple[str, ...] = ()
    """Ray's accelerator types that an autoscaler must not start for this job."""
    numbers: tuple[int, ...] = ()
    """The numbers of workers that will do, ascending; none where it is one throughout."""
    versions: Mapping[str, str | None] = field(default_factory=dict)
    """Package -> version on the nodes that preflight accepted; each worker compares its own."""

    @property
    def fewest(self) -> int:
        """Workers without which the run does not go on."""
        return self.numbers[0] if self.numbers else self.num_workers

    @property
    def asked(self) -> str:
        """How many workers are asked for, in words."""
        if self.numbers:
            return f"{self.fewest} workers at least"
        return plural(self.num_workers, "worker")

    @property
    def label_selector(self) -> dict[str, str] | None:
        """Where workers may be, in Ray's terms; none means anywhere.

        Nodes are named that must not be used, so that one which joins later may be: a worker
        checks itself before it begins.
        """
        unwanted = {
            "ray.io/node-id": self.avoided,
            "ray.io/accelerator-type": self.avoided_accelerators,
        }
        return {key: f"!in({','.join(v)})" for key, v in unwanted.items() if v} or None
