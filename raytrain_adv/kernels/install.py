"""On a worker: try out what was chosen, then put it in place."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from raytrain_adv.kernels.choice import Choice, Chosen
from raytrain_adv.kernels.probe import Trial, try_out
from raytrain_adv.kernels.swap import LayerSource, load_layer, swap


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
            f"by {self.trial.value_error:.1e}, gradients by {self.trial.gradient_error:.1e}; in "
            f"{self.num_modules} modules"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the trial as JSON types."""
        values = asdict(self)
        return {**{k: v for k, v in values.items() if k != "trial"}, **values["trial"]}


def install(
    model: nn.Module, choice: Choice, device: torch.device, dtype: torch.dtype, compiled: bool
) -> list[SiteTrial]:
    """Try each layer out on each kind of module it is for, and swap the forward passes.

    Raises:
        JobError: when a layer is wrong, has no gradient, bypasses a module or is not put in place.
    """
    groups: dict[tuple[LayerSource, tuple[str, ...]], list[str]] = {}
    names: dict[LayerSource, Chosen] = {}
    for fqn, chosen in choice.layers.items():
        source = LayerSource(chosen.build.folder.absolute(), chosen.layer, chosen.site)
        names[source] = chosen
        kinds = tuple(type(part).__qualname__ for part in model.get_submodule(fqn).modules())
        groups.setdefault((source, kinds), []).append(fqn)
    trials = []
    for (source, _), fqns in groups.items():
        module = model.get_submodule(fqns[0])
        owner, _, attribute = fqns[0].rpartition(".")
        trial = try_out(
            load_layer(source).forward,
            module,
            names[source].name,
            device,
            dtype,
            model.get_submodule(owner),
            attribute,
        )
        kind = type(module).__name__
        precision = str(dtype).removeprefix("torch.")
        trials.append(SiteTrial(names[source].name, kind, device.type, precision, trial, len(fqns)))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for (source, _), fqns in groups.items():
        swap({fqn: model.get_submodule(fqn) for fqn in fqns}, source, device, compiled)
    return trials
