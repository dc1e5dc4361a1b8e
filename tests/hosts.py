"""A network of hosts on this one machine: each a network namespace with an address and a loopback
of its own, and a cable that can be pulled. Files are the machine's, as on shared storage.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOOLS = ("unshare", "nsenter", "ip")
LAN = "10.77.0"
NAMESPACE = ("unshare", "--user", "--map-root-user", "--net")
"""With a user namespace around it, which needs no root."""


def unavailable() -> str:
    """Return why this machine can have no such network; empty where it can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not installed (util-linux, iproute2)"
    make = "ip link add name a type veth peer name b && ip link add name c type bridge"
    tried = subprocess.run([*NAMESPACE, "sh", "-c", make], capture_output=True, text=True)
    said = tried.stderr.strip() or f"exit code {tried.returncode}"
    return f"network namespaces are not allowed here: {said}" if tried.returncode else ""


@dataclass
class Host:
    """A host, named by its address; it lasts as long as the process that holds its namespace."""

    address: str
    holder: subprocess.Popen[str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def inside(self) -> list[str]:
        """What a command is preceded by to run there."""
        target = ["--target", str(self.holder.pid)]
        return ["nsenter", *target, "--user", "--net", "--preserve-credentials"]

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a process there."""
        self.started.append(subprocess.Popen([*self.inside, *command], text=True, **options))
        return self.started[-1]

    def do(self, *command: str) -> None:
        """Run a command there to its end."""
        subprocess.run([*self.inside, *command], check=True, capture_output=True, text=True)

    def power_off(self) -> None:
        """Kill every process there; the host itself stays."""
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.started:
            process.wait()

    def _pids(self) -> Iterator[int]:
        own = os.stat(f"/proc/{self.holder.pid}/ns/net").st_ino
        for path in Path("/proc").glob("[0-9]*/ns/net"):
            pid = int(path.parts[2])
            with contextlib.suppress(OSError):
                if pid != self.holder.pid and os.stat(path).st_ino == own:
                    yield pid


class Network:
    """Hosts 10.77.0.1, 10.77.0.2, ... on one switch."""

    def __init__(self, count: int) -> None:
        self.hosts: list[Host] = []
        self._switch = Host("", _holder(NAMESPACE))
        self._switch.do("ip", "link", "add", "name", "switch", "type", "bridge")
        self._switch.do("ip", "link", "set", "switch", "up")
        for number in range(1, count + 1):
            self.hosts.append(self._add(number))

    def _add(self, number: int) -> Host:
        inside = [*self._switch.inside, "unshare", "--net"]
        host = Host(f"{LAN}.{number}", _holder(inside))
        there = ["peer", "name", "lan0", "netns", str(host.holder.pid)]
        self._switch.do("ip", "link", "add", "name", f"port{number}", "type", "veth", *there)
        self._switch.do("ip", "link", "set", f"port{number}", "master", "switch", "up")
        host.do("ip", "link", "set", "lo", "up")
        host.do("ip", "addr", "add", f"{host.address}/24", "dev", "lan0")
        host.do("ip", "link", "set", "lan0", "up")
        host.do("ip", "route", "add", "default", "via", host.address)
        return host

    def cut_off(self, host: Host) -> None:
        """Pull the host's cable: nothing that is sent arrives, and nobody is told."""
        self._set(host, "down")

    def reconnect(self, host: Host) -> None:
        """Plug the cable in again."""
        self._set(host, "up")

    def _set(self, host: Host, state: str) -> None:
        self._switch.do("ip", "link", "set", f"port{host.address.rpartition('.')[2]}", state)

    def close(self) -> None:
        """End the hosts and what runs on them."""
        for host in [*self.hosts, self._switch]:
            host.power_off()
            host.holder.kill()
            host.holder.communicate()


def _holder(make: Sequence[str]) -> subprocess.Popen[str]:
    """Make a namespace, and return the process that holds it."""
    command = [*make, "sh", "-c", "echo made; exec sleep infinity"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "made\n"
    return holder
