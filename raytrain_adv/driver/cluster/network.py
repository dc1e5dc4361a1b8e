"""The network of a run's process group: that of Ray's own node addresses."""

import os
import socket
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib import import_module
from ipaddress import ip_address
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from torch.distributed import TCPStore  # type: ignore[attr-defined] # it has no __all__


class NodeNetwork(TorchConfig):  # type: ignore[misc] # ray is Any to mypy
    """Ray's process group, on the network of Ray's own node addresses: loopback on one host."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """Return the class that starts the process group."""
        return _Backend


class _Backend(_TorchBackend):  # type: ignore[misc] # ray is Any to mypy
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(use_node_network)
        super().on_start(worker_group, backend_config)


def use_node_network() -> None:
    """Make gloo and rank 0's store listen on this node's address alone, and NCCL on loopback if
    that is the address; have Ray keep the port of the store. Interfaces that the user named stay.

    gloo resolves the host's name. Where /etc/hosts maps it to 127.0.0.1 or 127.0.1.1, as on many
    machines, workers would tell other hosts to connect to loopback (torch 2.13,
    ProcessGroupGloo.cpp).
    """
    address = ray.util.get_node_ip_address()
    known = psutil.net_if_addrs().items()
    addresses = {name: [entry.address for entry in entries] for name, entries in known}
    if name := find_interface(address, addresses):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        if ip_address(address).is_loopback:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")
    # The name torch.distributed.rendezvous is a function of this module.
    module: Any = import_module("torch.distributed.rendezvous")
    module._create_c10d_store = bound_store
    module = import_module("ray.train._internal.utils")
    module.find_free_port = hold_free_port


_held: list[socket.socket] = []


def hold_free_port(family: socket.AddressFamily = socket.AF_INET) -> int:
    """Return a port that the system gives to nobody else while this process runs.

    Ray chooses the store's port and lets go of it; seconds later, when all workers know it, another
    process may have it (2.60). Remove when Ray keeps it. Servers, which reuse addresses, can bind.
    """
    held = socket.socket(family)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("", 0))
    _held.append(held)
    return int(held.getsockname()[1])


def bound_store(
    host: str, port: int, rank: int, world_size: int, timeout: timedelta, use_libuv: bool = True
) -> TCPStore:
    """Return the store of a process group, which requires no token: its server listens on `host`.

    TCPStore listens on every interface, whatever its host (torch 2.11 to 2.13). Remove when it
    listens on its host.
    """
    options: dict[str, Any] = {"multi_tenant": True, "use_libuv": use_libuv}
    if rank == 0:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        server = socket.create_server((host, port), family=family, backlog=2048)
        options["master_listen_fd"] = server.detach()
    return TCPStore(host, port, world_size, rank == 0, timeout, **options)


def find_interface(address: str, addresses: Mapping[str, Sequence[str]]) -> str:
    """Return the interface that has an address; empty if none has, as behind NAT."""
    return next((name for name, known in addresses.items() if address in known), "")
