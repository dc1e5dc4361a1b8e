"""Which modules of a model are alike, so that one of them stands for all in a trial, and what the
trials found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from raytrain_adv.trial.module import Candidate, Trial, try_out

Layer = TypeVar("Layer")


@dataclass(frozen=True)
class SiteTrial:
    """A layer tried out on one kind of module."""

    layer: str
    """Kernel, commit and layer."""
    module: str
    """The class it stands in for."""
    device: str
    dtype: str
    trial: Trial
    num_modules: int

    @property
    def sentence(self) -> str:
        """The trial in words."""
        return (
            f"{self.layer} tried out in {self.module} on {self.device} in {self.dtype}: values off "
            f"by {self.trial.value_error:.1e}, gradients by {self.trial.gradient_error:.1e}, of "
            f"which rounding explains {self.trial.allowed:.1e}; in {self.num_modules} modules"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the trial as JSON types."""
        values = asdict(self)
        return {**{k: v for k, v in values.items() if k != "trial"}, **values["trial"]}


def alike(model: nn.Module, layers: Mapping[str, Layer]) -> list[tuple[Layer, list[str]]]:
    """Group modules that get the same layer, and are built alike: the same classes inside, of the
    same sizes.

    Args:
        model: it has the modules.
        layers: module -> its layer, by what tells it from others.
    """
    groups: dict[tuple[Layer, object], list[str]] = {}
    for fqn, layer in layers.items():
        module = model.get_submodule(fqn)
        kinds = tuple(type(part).__qualname__ for part in module.modules())
        sizes = tuple(parameter.shape for parameter in module.parameters())
        groups.setdefault((layer, (kinds, sizes)), []).append(fqn)
    return [(layer, fqns) for (layer, _), fqns in groups.items()]


def tried_out(
    candidate: Candidate, layer: str, count: int, device: torch.device, dtype: torch.dtype
) -> SiteTrial:
    """Try a layer out; return what was found, for so many modules.

    Raises:
        JobError: when it is wrong, bypasses a module, or has no gradient.
    """
    trial = try_out(candidate, device, dtype)
    precision = str(dtype).removeprefix("torch.")
    return SiteTrial(layer, candidate.kind, device.type, precision, trial, count)
