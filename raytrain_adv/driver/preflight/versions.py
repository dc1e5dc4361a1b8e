"""Package versions that all workers must share, and messages where they differ."""

from collections.abc import Mapping, Sequence

from raytrain_adv.errors import ClusterError
from raytrain_adv.hardware import package_versions
from raytrain_adv.text import listed

DECISIVE = ("torch", "torchao", "transformers", "raytrain_adv")
"""Packages that can change results: nodes that differ in one are not used together."""
CODE = "raytrain_adv's code"
IMAGE = "use the same image or environment on every node"
SHOWN_NODES = 3

Versions = Mapping[str, str | None]


def decisive(versions: Versions) -> dict[str, str | None]:
    """Return the versions that all workers must share."""
    return {name: versions.get(name) for name in DECISIVE}


def difference(versions: Versions, others: Versions) -> str:
    """Return the differences as `torchao 0.17.0 (0.18.0 elsewhere)`; empty if all are equal."""
    return ", ".join(
        f"{name} {versions.get(name) or 'is missing'} ({others[name] or 'none'} elsewhere)"
        for name in others
        if versions.get(name) != others[name]
    )


def describe_differences(of_nodes: Sequence[tuple[str, Versions]]) -> list[str]:
    """Return a sentence for each package, but the decisive ones, of which nodes have several
    versions; `of_nodes` are each node's address and versions.
    """
    sentences = []
    for name in sorted({name for _, versions in of_nodes for name in versions} - {*DECISIVE}):
        nodes: dict[str | None, list[str]] = {}
        for address, versions in of_nodes:
            nodes.setdefault(versions.get(name), []).append(address)
        if len(nodes) > 1:
            kinds = [f"{v or 'none'} on {listed(where, SHOWN_NODES)}" for v, where in nodes.items()]
            sentences.append(f"{name} differs between the nodes: {', '.join(kinds)}")
    return sentences


def require(accepted: Versions) -> None:
    """Raise ClusterError if this worker's versions are not those that preflight accepted."""
    if differs := difference(package_versions(), accepted):
        what = "A worker has other versions than the nodes had when they were checked"
        raise ClusterError(what, differs, IMAGE)
