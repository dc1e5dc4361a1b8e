"""Check builds of a kernel, and choose one for a worker by the rules of kernels 0.17.2
(kernels/variants.py), which chooses for its own machine only.
"""

import platform
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from raytrain_adv.errors import JobError
from raytrain_adv.hardware import HardwareFacts
from raytrain_adv.text import parse_json

VERSIONED = re.compile(
    r"(?P<framework>torch-stable-abi|torch)(?P<major>\d)(?P<minor>\d+)(-cxx11)?"
    r"-(?P<backend>cpu|cu(?P<cuda_major>\d+)(?P<cuda_minor>\d))-(?P<machine>\w+)-(?P<os>\w+)"
)


@dataclass(frozen=True)
class Target:
    """What a build must fit."""

    torch: tuple[int, int]
    cuda: tuple[int, int] | None  # CUDA version that PyTorch was built for; None on a CPU
    machine: str  # processor, as x86_64

    @classmethod
    def of(cls, facts: HardwareFacts) -> "Target":
        """Return what a worker on this machine needs."""
        version = facts.cuda_version if facts.device_type == "cuda" else None
        cuda = numbers(version) if version else None
        return cls(numbers(facts.versions.get("torch") or "0.0"), cuda, platform.machine())

    def __str__(self) -> str:
        cuda = f"CUDA {self.cuda[0]}.{self.cuda[1]}" if self.cuda else "a CPU"
        return f"PyTorch {self.torch[0]}.{self.torch[1]} with {cuda} on {self.machine}"


def numbers(version: str) -> tuple[int, int]:
    """Return the first two numbers of a version: 2.11.0+cu130 gives (2, 11)."""
    found = [int(n) for n in re.findall(r"\d+", version)[:2]]
    return (found[0], found[1]) if len(found) == 2 else (0, 0)


def choose(names: Iterable[str], target: Target) -> str | None:
    """Return the best of these builds for a target; None if none fits."""
    ranked = [(rank, name) for name in names if (rank := _rank(name, target)) is not None]
    return max(ranked)[1] if ranked else None


def is_build(name: str) -> bool:
    """Whether a folder's name is that of a build."""
    return bool(VERSIONED.fullmatch(name)) or re.fullmatch(r"torch-[a-z]+", name) is not None


def _rank(name: str, target: Target) -> tuple[int, ...] | None:
    """Return a build's place in the order of preference; None if it does not fit."""
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


def python_name(folder: Path) -> str:
    """Check a build and return the name under which the kernels package imports it. Raises JobError
    when it has links, its metadata is unreadable, it needs other kernels, or its name is that of an
    installed package.
    """
    for path in folder.rglob("*"):
        if not path.is_file() and (path.is_symlink() or not path.is_dir()):
            raise JobError(
                f"the kernel in {folder} has an entry that is not a file",
                f"{path} is a link to {path.readlink()}" if path.is_symlink() else str(path),
                "remove it: a build is files and folders, and is copied to the workers",
            )
    file = folder / "metadata.json"
    metadata = _read(file)
    if depends := [str(one) for one in metadata["kernel-depends"]]:
        raise JobError(
            f"the kernel in {folder} needs other kernels, which are not fetched for it",
            f"kernel-depends: {', '.join(depends)}",
            "name a kernel that has no dependencies",
        )
    name = str(metadata["id"])
    known = name in sys.stdlib_module_names or name in sys.builtin_module_names
    if not name.isidentifier() or known or PathFinder.find_spec(name) is not None:
        raise JobError(
            f"the kernel in {folder} cannot be imported under its id",
            f"{file}: id {name!r} is "
            + ("that of an installed package" if name.isidentifier() else "no name in Python"),
            "give it an unused id, as _my_kernel_cuda_1",
        )
    return name


def _read(file: Path) -> dict[str, Any]:
    try:
        metadata = parse_json(file.read_text())
        depends = list(metadata.get("kernel-depends", []))
        return {"kernel-depends": depends, "id": metadata["id"] + ""}
    except KeyError as error:
        found = f"it has no {error}"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        found = str(error)
    raise JobError(
        "a kernel's metadata.json cannot be read",
        f"{file}: {found}",
        'it needs id, name, version, license, backend and "python-depends"',
    )
