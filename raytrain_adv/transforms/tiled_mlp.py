"""The MLP of each layer on some tokens at a time, for long sequences.

Source: Arctic Long Sequence Training (https://arxiv.org/abs/2506.13996), TiledMLP.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, StrictBool

from raytrain_adv.transforms.modules import class_name, own_forward
from raytrain_adv.transforms.transform import Change, Context, Plan, Transform, Worker

if TYPE_CHECKING:
    from torch import Tensor, nn

TILE_TOKENS = 16_384
"""Tokens of a tile with tiled_mlp: true: 2.6 GiB in the backward pass of the 8B shape, and products
that fill an H200."""
TRIED = 336
"""Tokens of a tile in the trial, which has 1,008."""


class TiledMlp(Transform):
    """Compute the MLP of each layer on a tile of the tokens at a time, in both directions."""

    name: ClassVar[str] = "tiled_mlp"
    feature: ClassVar[str] = "Tiled MLP"
    stage: ClassVar[str] = "kernel"
    stacks_on: ClassVar[frozenset[str]] = frozenset({"adapter", "precision", "liger", "kernels"})
    tried_with: ClassVar[dict[str, Any]] = {"tiled_mlp": 16}

    tiled_mlp: StrictBool | Annotated[int, Field(ge=16, multiple_of=16)] = False
    """Compute each layer's MLP on a part of the tokens at a time, forward and backward, which long
    sequences need: true on 16,384 tokens, a number on that many. Backward computes it again."""

    @property
    def tokens(self) -> int:
        """The tokens of a tile."""
        return TILE_TOKENS if self.tiled_mlp is True else int(self.tiled_mlp)

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Find the MLPs."""
        found = dict(mlps(model))
        kinds = {fqn: class_name(model.get_submodule(fqn)) for fqn in found}
        named = f"{self.tokens:,} tokens at a time"
        changes = {f: Change(kinds[f], named, "forward") for f, why in found.items() if not why}
        note = "weight gradients are summed over tiles in float32, and rounded once"
        return Plan(self.name, changes, {f: why for f, why in found.items() if why}, (note,))

    def install(self, model: nn.Module, plan: Plan, worker: Worker) -> Plan:
        """Tile the planned MLPs; compare values and gradients of each kind with the whole one's."""
        import torch

        from raytrain_adv.ops.tiles import Tiles
        from raytrain_adv.trial.module import Candidate, group_alike, try_module

        sentences = []
        for name, fqns in group_alike(model, {f: c.after for f, c in plan.changes.items()}):
            module = model.get_submodule(fqns[0])
            of_class = own_forward(module) or type(module).forward

            def on_tiles(own: Any, x: Tensor, of_class: Any = of_class) -> Tensor:
                own.tiles = Tiles(own, MethodType(of_class, own), TRIED)
                return _on_tiles(own, x)

            where, fix = (worker.device, worker.dtype), "set tiled_mlp: false"
            candidate = Candidate(on_tiles, "tiled_mlp", module, fix, *where)
            sentences.append(try_module(candidate, name, len(fqns)).sentence)
        for fqn in plan.changes:
            own: Any = model.get_submodule(fqn)
            own.tiles = Tiles(own, own.forward, self.tokens)
            if worker.job.parallel.torch_compile:
                own.tiles.compute = torch.compile(own.forward)
            own.forward = MethodType(_on_tiles, own)
        return plan.with_notes(*sentences)


def _on_tiles(module: Any, x: Tensor) -> Tensor:
    result: Tensor = module.tiles(x)
    return result


def mlps(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield each layer's MLPs by fqn, and why it stays whole, if it does."""
    from torch import nn

    from raytrain_adv.ops.experts.find import routers, stacked

    modules = dict(model.named_modules())
    experts, choosing = set(stacked(model)), routers(model)
    for fqn, module in modules.items():
        if not is_mlp(fqn):
            continue
        inside = [name for name in modules if name.startswith(f"{fqn}.")]
        why = ""
        if experts & set(inside) or choosing & set(inside) or any("experts" in n for n in inside):
            why = "it routes tokens to experts"
        elif not hasattr(module, "tiles") and not _takes_one_tensor(module):
            why = "it takes more than its input"
        elif drops := [n for n in inside if isinstance(m := modules[n], nn.Dropout) and m.p > 0]:
            why = f"it has dropout ({drops[0]}), which backward would draw again"
        yield fqn, why


def is_mlp(fqn: str) -> bool:
    """Whether a module is a layer's MLP, by its name: the last part after the layer's number."""
    from raytrain_adv.dtensor import plain_name

    *_, number, name = ("", "", *plain_name(fqn).split("."))
    return number.isdecimal() and name in ("mlp", "feed_forward", "ffn", "ff")


def _takes_one_tensor(module: nn.Module) -> bool:
    every: Any = own_forward(module) or type(module).forward
    needed = [p for p in inspect.signature(every).parameters.values() if p.default is p.empty]
    return isinstance(every, FunctionType) and len(needed) == 2  # self and the tensor
