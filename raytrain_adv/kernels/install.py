"""On a worker: try out what was chosen, then put it in place."""

from __future__ import annotations

import torch
from torch import nn

from raytrain_adv.kernels.choice import Choice
from raytrain_adv.kernels.swap import LayerSource, load_layer, swap
from raytrain_adv.trial.module import Candidate
from raytrain_adv.trial.sites import SiteTrial, alike, tried_out


def install(
    model: nn.Module, choice: Choice, device: torch.device, dtype: torch.dtype, compiled: bool
) -> list[SiteTrial]:
    """Try each layer out on each kind of module it is for, and swap the forward passes.

    Raises:
        JobError: when a layer is wrong, has no gradient, bypasses a module or is not put in place.
    """
    sources = {
        fqn: LayerSource(chosen.build.folder.absolute(), chosen.layer, chosen.site)
        for fqn, chosen in choice.layers.items()
    }
    groups = alike(model, sources)
    trials = []
    for source, fqns in groups:
        owner, _, attribute = fqns[0].rpartition(".")
        name = choice.layers[fqns[0]].name
        candidate = Candidate(
            load_layer(source).forward,
            f"the kernel {name}",
            model.get_submodule(fqns[0]),
            "leave that layer out with layers",
            model.get_submodule(owner),
            attribute,
        )
        trials.append(tried_out(candidate, name, len(fqns), device, dtype))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for source, fqns in groups:
        swap({fqn: model.get_submodule(fqn) for fqn in fqns}, source, device, compiled)
    return trials
