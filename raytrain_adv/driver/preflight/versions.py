"""Software that must be the same wherever workers run, and what to say where it is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raytrain_adv.errors import ClusterError
from raytrain_adv.hardware import package_versions

DECISIVE = ("torch", "torchao", "transformers", "raytrain_adv")
"""Packages that can change what is computed: nodes that differ in one are not used together."""
CODE = "raytrain_adv's code"
IMAGE = "give every node the same image or environment"

Versions = Mapping[str, str | None]


def decisive(versions: Versions) -> dict[str, str | None]:
    """Return the versions that all workers must share."""
    return {name: versions.get(name) for name in DECISIVE}


def difference(versions: Versions, others: Versions) -> str:
    """Return what differs as `torchao 0.17.0 (0.18.0 elsewhere)`; empty where all agree."""
    return ", ".join(
        f"{name} {versions.get(name) or 'is missing'} ({others[name] or 'none'} elsewhere)"
        for name in others
        if versions.get(name) != others[name]
    )


def spread(of_nodes: Sequence[tuple[str, Versions]]) -> list[str]:
    """Return a sentence for each package that does not have one version on all nodes.

    Args:
        of_nodes: address of a node and its versions.
    """
    sentences = []
    names = {name for _, versions in of_nodes for name in versions}
    for name in sorted(names):
        nodes: dict[str | None, list[str]] = {}
        for address, versions in of_nodes:
            nodes.setdefault(versions.get(name), []).append(address)
        if len(nodes) > 1:
            kinds = [f"{v or 'none'} on {some(where)}" for v, where in nodes.items()]
            sentences.append(f"{name} differs between the nodes: {', '.join(kinds)}")
    return sentences


def require(accepted: Versions) -> None:
    """Refuse to work with other versions than those the nodes were accepted with.

    Raises:
        ClusterError: naming what differs; the node was changed, or joined after the check.
    """
    here = package_versions()
    differs = difference(here, accepted)
    if differs:
        raise ClusterError(
            "A worker has other versions than the nodes had when they were checked", differs, IMAGE
        )


def some(addresses: Sequence[str]) -> str:
    """Return the first few addresses, and how many more there are."""
    more = len(addresses) - 3
    return ", ".join(addresses[:3]) + (f" and {more} more" if more > 0 else "")
