"""A place in a model whose module is not built: its weights stay in the checkpoint."""

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import nn


class AbsentError(RuntimeError):
    """A forward pass came to a module that is not built."""


class Absent(nn.Module):
    """Stands for a module that no training step needs, with its plain attributes."""

    inner: tuple[str, ...]
    """Names of the modules that it has when it is built."""
    dtype = torch.float32
    device = torch.device("cpu")

    @classmethod
    def of(cls, fqn: str, module: nn.Module) -> "Absent":
        """Return a stand-in for the module of this name."""
        new = cls()
        own = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}
        vars(new).update(own, fqn=fqn, inner=tuple(name for name, _ in module.named_modules()))
        return new

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise an AbsentError: what is not built computes nothing."""
        raise AbsentError(self.fqn)


def absent_modules(model: nn.Module) -> Iterator[tuple[str, Absent]]:
    """Yield the modules of a model that are not built, by fqn."""
    for fqn, module in model.named_modules():
        if isinstance(module, Absent):
            yield fqn, module


def is_absent(name: str, model: nn.Module) -> bool:
    """Whether a tensor's name lies in a module that is not built."""
    return any(name.startswith(f"{fqn}.") for fqn, _ in absent_modules(model))


def shortest_names(model: nn.Module, chosen: list[str]) -> list[str]:
    """Return the last segments of modules' names if those match nothing else, in absent parts
    either; otherwise the whole names.
    """
    ends = {fqn.rpartition(".")[2] for fqn in chosen}
    absent = (f"{fqn}.{name}" for fqn, part in absent_modules(model) for name in part.inner)
    every = (*(fqn for fqn, _ in model.named_modules()), *absent)
    by_end = {fqn for fqn in every if fqn.rpartition(".")[2] in ends}
    return sorted(ends if by_end == set(chosen) else chosen)
