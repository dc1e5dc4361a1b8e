"""Host memory that a run needs on a node, and whether a node has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from raytrain_adv.checkpoint.staging import LARGEST_SHARE
from raytrain_adv.estimate.memory import MemoryPrediction


@dataclass(frozen=True)
class HostNeed:
    """Host memory of a node's workers in GiB; without Python and PyTorch, some 3 GiB a worker, and
    the node's own processes.
    """

    workers: int
    """Most workers on the node."""
    offloaded: float
    """Per worker: parameters, gradients and optimizer states under fsdp_cpu_offload."""
    kept: float
    """Per worker: copies of checkpoints, kept for the run."""
    new: float
    """Per worker: new copies for each checkpoint."""

    @staticmethod
    def of(memory: MemoryPrediction, workers: int) -> HostNeed:
        """Return the need of this many workers on a node."""
        return HostNeed(workers, memory.host, memory.copies.kept, memory.copies.new)

    @property
    def per_worker(self) -> float:
        """The need of one worker."""
        return self.offloaded + self.kept + self.new

    @property
    def per_node(self) -> float:
        """The need of the node's workers."""
        return self.workers * self.per_worker

    @property
    def least_free_to_lock(self) -> float:
        """Free host memory with which the kept copies are page-locked."""
        return self.workers * self.kept / LARGEST_SHARE

    def sentence(self) -> str:
        """Return the need in a sentence."""
        named = (
            (self.offloaded, "offloaded"),
            (self.kept, "copies of checkpoints, kept for the run"),
            (self.new, "new copies for each checkpoint"),
        )
        needed = [(gib, what) for gib, what in named if gib >= 0.05]
        parts = [f"{gib:.1f} {what}" if len(needed) > 1 else what for gib, what in needed]
        node = f", {self.per_node:.1f} GiB on a node of {self.workers}" if self.workers > 1 else ""
        return f"{self.per_worker:.1f} GiB per worker{node}: {'; '.join(parts)}"

    def verdicts(self, node_gib: float | None) -> Iterator[str]:
        """Yield whether copies are page-locked on a node with this much host memory, if known."""
        if node_gib is not None and self.per_node > node_gib:
            yield f"does not fit: this node has {node_gib:.0f} GiB of host memory"
        elif node_gib is not None and self.least_free_to_lock > node_gib:
            yield (
                f"not page-locked on this node of {node_gib:.0f} GiB: copies would be more than "
                "half of it; steps wait longer for checkpoints"
            )
        elif self.kept:
            known = "" if node_gib is None else f" (this node has {node_gib:.0f})"
            yield (
                f"page-locked where a node has {self.least_free_to_lock:.1f} GiB free{known}, "
                "twice the copies; else steps wait longer for checkpoints"
            )
