"""Compute in a lower dtype than parameters have, on one worker: each layer casts its own.

What FSDP2's MixedPrecisionPolicy does, bit for bit, without its hooks, streams and copies of the
gathered weights: with one worker there is nothing to gather.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _Cast(torch.autograd.Function):
    """Copies of float32 tensors in another dtype, in one launch; their gradients in float32."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *masters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [one.dtype for one in masters]
        return tuple(_copies(masters, [dtype] * len(masters)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [(g, d) for g, d in zip(gradients, ctx.dtypes, strict=True) if g is not None]
        cast = iter(_copies([g for g, _ in there], [d for _, d in there]))
        return (None, *(None if g is None else next(cast) for g in gradients))


def _copies(tensors: Any, dtypes: list[torch.dtype]) -> list[Tensor]:
    made = [torch.empty_like(t, dtype=d) for t, d in zip(tensors, dtypes, strict=True)]
    if made:
        torch._foreach_copy_(made, list(tensors))
    return made


Place = tuple[nn.Module, str]
"""A module, and the name of a parameter of it."""


class _Unit:
    """Hooks of a module that put copies of its parameters in their places while it computes."""

    def __init__(self, places: list[list[Place]], dtype: torch.dtype) -> None:
        self.places = places  # those of each parameter; tied ones have several
        self.dtype = dtype
        self.held: list[nn.Parameter] = []

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def enter(self, module: nn.Module, args: Any) -> None:
        """Put the copies in."""
        self.held = [owner._parameters[name] for (owner, name), *_ in self.places]  # type: ignore[misc]
        trained = [p for p in self.held if p.requires_grad]
        frozen = [p for p in self.held if not p.requires_grad]
        copies = iter(_Cast.apply(self.dtype, *trained) if trained else ())  # type: ignore[no-untyped-call]
        others = iter(_copies(frozen, [self.dtype] * len(frozen)))
        for master, places in zip(self.held, self.places, strict=True):
            copy = next(copies if master.requires_grad else others)
            for owner, name in places:
                owner._parameters[name] = copy  # type: ignore[assignment] # as with FSDP2

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Put the parameters back."""
        for master, places in zip(self.held, self.places, strict=False):
            for owner, name in places:
                owner._parameters[name] = master
        self.held = []


def cast_in_forward(
    unit: nn.Module, dtype: torch.dtype, leave_out: Callable[[nn.Parameter], bool]
) -> None:
    """Make a module compute with copies of its floating-point parameters in `dtype`, made in each
    forward pass; except those to leave out, such as those of a layer with hooks of its own.
    """
    places: dict[nn.Parameter, list[Place]] = {}
    for owner in unit.modules():
        for name, p in owner._parameters.items():
            if p is not None and p.is_floating_point() and p.dtype != dtype and not leave_out(p):
                places.setdefault(p, []).append((owner, name))
    if places:
        casts = _Unit(list(places.values()), dtype)
        unit.register_forward_pre_hook(casts.enter, prepend=True)
        unit.register_forward_hook(casts.leave, always_call=True)
