"""gloo between hosts: each worker speaks over the network that its Ray node is known by."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

INTERFACE = "GLOO_SOCKET_IFNAME"


class NodeNetwork(TorchConfig):  # type: ignore[misc] # ray is Any to mypy
    """Ray's process group, whose gloo uses the network of Ray's own addresses.

    gloo asks what the host's name stands for. Where /etc/hosts says 127.0.0.1 or 127.0.1.1, as it
    does on many machines, workers would tell the other hosts' workers to find them on loopback
    (torch 2.13, ProcessGroupGloo.cpp).
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What starts the process group."""
        return _Backend


class _Backend(_TorchBackend):  # type: ignore[misc] # ray is Any to mypy
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(use_nodes_network)
        super().on_start(worker_group, backend_config)


def use_nodes_network() -> None:
    """Have gloo use the interface with the node's address, unless its user has named one."""
    addresses = {
        name: [one.address for one in of_it] for name, of_it in psutil.net_if_addrs().items()
    }
    if name := interface(ray.util.get_node_ip_address(), addresses):
        os.environ.setdefault(INTERFACE, name)


def interface(address: str, addresses: Mapping[str, Sequence[str]]) -> str:
    """Return the interface that has an address; empty where none has, as behind a translation of
    addresses, or for 127.0.0.2.
    """
    return next((name for name, of_it in addresses.items() if address in of_it), "")
