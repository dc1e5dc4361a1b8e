"""Which build of a kernel fits a machine.

Source: the rules and the order are those of kernels 0.17.2 (kernels/variants.py), which can only
choose for the machine it runs on; the driver has to choose for the workers.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass

from raytrain_adv.hardware import HardwareFacts

VERSIONED = re.compile(
    r"(?P<framework>torch-stable-abi|torch)(?P<major>\d)(?P<minor>\d+)(-cxx11)?"
    r"-(?P<backend>cpu|cu(?P<cuda_major>\d+)(?P<cuda_minor>\d))-(?P<machine>\w+)-(?P<os>\w+)"
)


@dataclass(frozen=True)
class Target:
    """What a build has to fit."""

    torch: tuple[int, int]
    cuda: tuple[int, int] | None
    """CUDA version that PyTorch was built for; none on a CPU."""
    machine: str
    """Processor, as x86_64."""

    @classmethod
    def of(cls, facts: HardwareFacts) -> Target:
        """Return what a worker on this machine needs."""
        on_gpu = facts.device_type == "cuda"
        return cls(
            torch=numbers(facts.versions.get("torch") or "0.0"),
            cuda=numbers(facts.cuda_version) if on_gpu and facts.cuda_version else None,
            machine=platform.machine(),
        )

    def __str__(self) -> str:
        cuda = f"CUDA {self.cuda[0]}.{self.cuda[1]}" if self.cuda else "a CPU"
        return f"PyTorch {self.torch[0]}.{self.torch[1]} with {cuda} on {self.machine}"


def numbers(version: str) -> tuple[int, int]:
    """Return the first two numbers of a version: 2.11.0+cu130 gives (2, 11)."""
    found = [int(n) for n in re.findall(r"\d+", version)[:2]]
    return (found[0], found[1]) if len(found) == 2 else (0, 0)


def choose(names: Iterable[str], target: Target) -> str | None:
    """Return the best build for a target among the names of builds; none where none fits."""
    ranked = [(rank, name) for name in names if (rank := _rank(name, target)) is not None]
    return max(ranked)[1] if ranked else None


def is_build(name: str) -> bool:
    """Whether a folder's name is that of a build."""
    return bool(VERSIONED.fullmatch(name)) or re.fullmatch(r"torch-[a-z]+", name) is not None


def _rank(name: str, target: Target) -> tuple[int, ...] | None:
    """Return a build's place in the order of preference; none where it does not fit."""
    if name == "torch-universal":
        return (0, 0, 0, 0)
    if name == ("torch-cuda" if target.cuda else "torch-cpu"):
        return (1, 0, 0, 0)
    found = VERSIONED.fullmatch(name)
    if found is None or found["machine"] != target.machine or found["os"] != "linux":
        return None
    torch = (int(found["major"]), int(found["minor"]))
    stable = found["framework"] == "torch-stable-abi"
    if torch > target.torch or (not stable and torch != target.torch):
        return None
    if found["backend"] == "cpu":
        return (3 if stable else 2, *torch, 0) if target.cuda is None else None
    cuda = (int(found["cuda_major"]), int(found["cuda_minor"]))
    if target.cuda is None or cuda[0] != target.cuda[0] or cuda[1] > target.cuda[1]:
        return None
    return (3 if stable else 2, *torch, cuda[1])
