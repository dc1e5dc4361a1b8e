"""A mixture's routing, recorded in one forward pass and given to another: where two experts are
almost equally likely, rounding decides, and a right model's logits differ as a wrong one's would.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from raytrain_adv.ops.experts.find import expert_modules
from raytrain_adv.text import percent


@dataclass
class Call:
    """A call of a router, or of a layer's experts."""

    fqn: str
    given: Any
    """Its arguments, and those by name."""
    operators: tuple[str, ...]
    """What it chooses by."""
    output: Any = None
    scores: list[Tensor] = field(default_factory=list)
    """What each choice is made from, [..., experts]."""
    chosen: list[Tensor] = field(default_factory=list)
    """The indices of each choice; or which scores are above a threshold."""

    def repeat(self, model: nn.Module, fqn: str) -> Any:
        """Call a module of another model with the same arguments."""
        device, module = next(model.parameters()).device, model.get_submodule(fqn)
        args, named = tree_map_only(Tensor, lambda t: t.to(device), self.given)
        return module(*args, **named)


class Routing(TorchFunctionMode):
    """Record, until it is left, what a model's routers and experts are given, choose and return;
    with `held`, have routers choose as in that pass, and weigh by their own scores.

    A router is a module that calls topk, whatever its class: for experts or groups of them, or for
    positions to attend to. Phi-MoE's takes maxima, and what is above a threshold.
    """

    def __init__(self, model: nn.Module, held: "Routing | None" = None) -> None:
        super().__init__()
        self.routers: list[Call] = []
        self.experts: list[Call] = []
        self.running: list[Call] = []
        self.held = iter(held.choices() if held else [])
        self.hooks: list[Any] = []
        experts = expert_modules(model)
        for fqn, module in model.named_modules():
            if isinstance(module, PreTrainedModel):  # it chooses again, for the auxiliary loss
                continue
            more = ("max", "gt") if hasattr(module, "router_jitter_noise") else ()
            enter = partial(self._enter, fqn, ("topk", *more))
            leave = self._return if fqn in experts else self._leave
            self.hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            self.hooks.append(module.register_forward_hook(leave))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch has no types here
        for hook in self.hooks:
            hook.remove()

    def choices(self) -> list[Tensor]:
        """Return what was chosen, in order."""
        return [chosen for call in self.routers for chosen in call.chosen]

    def form(self) -> list[Any]:
        """Return what must be equal in passes that are compared."""
        return [len(self.experts), *(chosen.shape for chosen in self.choices())]

    def _enter(self, fqn: str, operators: tuple[str, ...], _: nn.Module, *given: Any) -> None:
        self.running.append(Call(fqn, given, operators))

    def _leave(self, *_: Any) -> None:
        self.running.pop()

    def _return(self, _: nn.Module, __: Any, output: Any) -> None:
        call = self.running.pop()
        call.given, call.output = _copy(call.given), _copy(output)
        self.experts.append(call)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not self.running or getattr(func, "__name__", "") not in self.running[-1].operators:
            return found
        call, is_pair = self.running[-1], isinstance(found, tuple)
        chosen: Tensor = found[1] if is_pair else found
        if chosen.is_floating_point() or chosen.shape[:-1] != args[0].shape[:-1]:
            return found
        if not call.chosen:
            call.given = _copy(call.given)
            self.routers.append(call)
        if (held := next(self.held, None)) is not None and held.shape == chosen.shape:
            chosen = held.to(chosen.device)
        call.scores.append(_copy(args[0]))
        call.chosen.append(_copy(chosen))
        return type(found)((args[0].gather(-1, chosen), chosen)) if is_pair else chosen


@dataclass(frozen=True)
class Trained:
    """What the trained model computes, for a folder to be compared with."""

    logits: Tensor
    """[batch, tokens, vocabulary], in host memory."""
    routing: Routing


@dataclass(frozen=True)
class Routed:
    """A folder's logits, float32 in host memory, and how its routing compares with training's."""

    logits: Tensor
    """As the folder routes."""
    held: Tensor
    """As the trained model routed, so that nothing but rounding is left."""
    num_rerouted: int
    """Tokens that the folder sends another way in some layer."""
    fault: str
    """The first router, or experts, that differ where they are given the same; empty if none."""


@torch.no_grad()
def compute_routed(
    model: Any, ids: Tensor, trained: Trained, most: float, with_experts: bool = True
) -> Routed:
    """Compute a folder's logits of `ids` [1, tokens], as it routes and as training did. Routers and
    experts are compared too, each given what it was in training; `most` is the share by which they
    may differ.
    """
    known = trained.routing
    with Routing(model) as own:
        logits = held = model(input_ids=ids, use_cache=False).logits.float().cpu()
    if own.form() != known.form():
        return Routed(logits, logits, 0, "")
    if not all(map(torch.equal, own.choices(), known.choices())):
        with Routing(model, known):
            held = model(input_ids=ids, use_cache=False).logits.float().cpu()
    apart = _differences(model, own, known, with_experts)
    faults = (f"{fqn} is {percent(d)} off, given the same" for fqn, d in apart if not d <= most)
    return Routed(logits, held, _rerouted(own, known, ids.numel()), next(faults, ""))


def _differences(
    model: nn.Module, own: Routing, known: Routing, with_experts: bool
) -> Iterator[tuple[str, float]]:
    with Routing(model, known) as again:
        for mine, call in zip(own.routers, known.routers, strict=True):
            call.repeat(model, mine.fqn)
    for mine, call in zip(again.routers, known.routers, strict=True):
        for scores, wanted in zip(mine.scores, call.scores, strict=True):
            yield mine.fqn, _apart(scores, wanted, 0)
    for mine, call in zip(own.experts, known.experts, strict=True) if with_experts else ():
        yield mine.fqn, _apart(call.repeat(model, mine.fqn), call.output, 1)


def _apart(found: Tensor, wanted: Tensor, axis: int) -> float:
    """Return by how much of its length a column (0) or row (1) of [..., columns] differs at most; a
    row counts as no shorter than the median.
    """
    a, b = (
        t.float().cpu().view(-1, t.shape[-1]).nan_to_num(torch.nan, 0.0, 0.0)
        for t in (found, wanted)
    )
    length = b.norm(dim=axis)
    least = float(length.median()) if axis else 0.0
    return float(((a - b).norm(dim=axis) / length.clamp(min=max(least, 1e-30))).max())


def _rerouted(own: Routing, known: Routing, num_tokens: int) -> int:
    moved = torch.zeros(num_tokens, dtype=torch.bool)
    for mine, call in zip(own.routers, known.routers, strict=True):
        for a, b, scores in zip(mine.chosen, call.chosen, call.scores, strict=True):
            # Not groups of experts, from which others are chosen; nor what is above a threshold.
            if scores.shape == call.scores[-1].shape and a.ndim > 1 and a.dtype != torch.bool:
                apart = a.sort().values != b.sort().values
                moved |= apart.view(num_tokens, -1).any(1)
    return int(moved.sum())


def _copy(value: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.detach().cpu().clone(), value)
