"""The section of a plan on many workers, as names and sentences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from raytrain_adv.estimate.limits import MOST_WORKERS, Limit, Scale
from raytrain_adv.estimate.traffic import GB


def title(s: Scale) -> str:
    """Return the section's title."""
    nodes = f"{s.nodes:,} node" if s.nodes == 1 else f"{s.nodes:,} nodes"
    return f"{s.world_size:,} workers on {nodes}: computed, not measured"


def rows(s: Scale, limits: tuple[Limit, ...]) -> Iterator[tuple[str, str]]:
    """Yield what is computed, the limits, and what was assumed."""
    yield "moved", _moved(s)
    yield from _times(s)
    yield from _checkpoint(s)
    h = s.head
    yield (
        "head node",
        f"gcs_server and Ray Train's controller take {h.cpu_s:,.0f} s of CPU to start and end a "
        f"run, {h.memory_gib:.1f} GiB and up to {h.files:,.0f} open files; extrapolated from a few "
        "empty CPU workers on one node",
    )
    yield "", "data and checkpoints do not pass through Ray's object store"
    yield from _limits(s, limits)
    yield "assumed", ", ".join(f"{k} {v:g}" for k, v in asdict(s.assumed).items())
    yield "", "another cluster: --assume NAME=VALUE"


def _moved(s: Scale) -> str:
    m = s.moved
    parts = []
    if m.gathers:
        parts.append(f"{m.gathers:,} all-gathers of {_gb(m.gathered)} in all")
    if m.reductions:
        parts.append(f"{m.reductions:,} reduce-scatters of {_gb(m.reduced)} in float32")
    if m.all_reductions:
        copies = f"{m.all_reductions:,} all-reduces of {_gb(m.all_reduced)}"
        parts.append(f"{copies} between {m.replicas:,} copies")
    return f"{_gb(m.received)} into each GPU a step: {', '.join(parts) or 'nothing'}"


def _times(s: Scale) -> Iterator[tuple[str, str]]:
    t = s.times
    if t.compute is None or t.most_exposed is None or t.least_exposed is None:
        yield "time of it", "not computed for CPUs"
        return
    yield (
        "time of it",
        f"{t.communication:.3f} s: {t.bandwidth:.3f} by bandwidth, {t.latency:.3f} in hops",
    )
    yield (
        "computation",
        f"{t.compute:.3f} s a step on {s.gpu}, FSDP2's copies in it, at the MFU of one H200",
    )
    low, high = max(t.compute, t.communication), t.compute + t.communication
    yield (
        "step",
        f"{low:.3f} to {high:.3f} s: exposed communication is {t.least_exposed:.0%} of it if all "
        f"is overlapped that can be, {t.most_exposed:.0%} if nothing is",
    )


def _checkpoint(s: Scale) -> Iterator[tuple[str, str]]:
    c = s.checkpoint
    none = "" if s.saves else "none is saved; it would be "
    yield (
        "checkpoint",
        f"{none}{_gb(c.total)}, {_gb(c.per_rank)} of it on each rank; training stands "
        f"still for {c.staging:.2f} s, written in {c.save:,.1f} s, read in {c.load:,.1f} s",
    )
    if c.metadata > 0.05 * c.total:
        yield "", f"{_gb(c.metadata)} of it is .metadata: rank 0 writes it, every rank reads all"
    if c.model_load:
        yield "", f"the weights to start from are read in {c.model_load:,.1f} s"
    if s.save_interval is not None:
        yield "", f"one is due every {s.save_interval:,.0f} s"


def _limits(s: Scale, limits: tuple[Limit, ...]) -> Iterator[tuple[str, str]]:
    if not limits:
        yield "limits", f"none is met with up to {MOST_WORKERS:,} workers"
    for place, limit in enumerate(limits):
        met = "met: " if limit.workers <= s.world_size else ""
        name = "first limit" if place == 0 else "then"
        yield name, f"{met}from {limit.workers:,} workers on {limit.what}"
        yield "", f"fix: {limit.fix}"


def _gb(number: float) -> str:
    return f"{number / GB:,.1f} GB" if number >= GB / 10 else f"{number / 1e6:,.2f} MB"
