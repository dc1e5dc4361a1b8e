"""Which share of a model a feature changes: of its weights, and of a token's matrix FLOPs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raytrain_adv.transforms.modules import in_adapter, output_heads

if TYPE_CHECKING:
    from torch import nn

SMALL = 0.005
"""Share below which a kind of weights that is left is not named."""


@dataclass(frozen=True)
class Coverage:
    """Shares from 0 to 1 of all weights, and of the FLOPs of all matrices that a token passes."""

    weights: float
    flops: float
    left: dict[str, tuple[float, float]]
    """Kind of module that is not covered -> its two shares."""

    def __str__(self) -> str:
        """Return the shares in words, with what is left."""
        text = f"{self.weights:.1%} of the weights, {self.flops:.1%} of the active matrix FLOPs"
        named = {k: both for k, both in self.left.items() if max(both) >= SMALL}
        rest = ", ".join(f"{kind} ({w:.1%}, {f:.1%})" for kind, (w, f) in named.items())
        return f"{text}; not covered: {rest}" if rest else text

    def as_dict(self) -> dict[str, Any]:
        """Return the shares for report.json."""
        left = {kind: {"weights": w, "flops": f} for kind, (w, f) in self.left.items()}
        return {"weights": self.weights, "flops": self.flops, "left": left}


def coverage(model: nn.Module, covered: Container[str]) -> Coverage:
    """Return the shares of the modules with the fqns that are covered; adapters do not count."""
    weights, flops = Counter[str](), Counter[str]()
    for kind, num_weights, num_flops in _parts(model, covered):
        weights[kind] += num_weights
        flops[kind] += num_flops
    all_weights, all_flops = weights.total() or 1, flops.total() or 1
    shares = {kind: (weights[kind] / all_weights, flops[kind] / all_flops) for kind in weights}
    own = shares.pop(COVERED, (0.0, 0.0))
    return Coverage(*own, dict(sorted(shares.items(), key=lambda item: -sum(item[1]))))


COVERED = ""


def _parts(model: nn.Module, covered: Container[str]) -> Iterator[tuple[str, int, int]]:
    """Yield each parameter's kind, its size, and its multiplications per token."""
    from torch import nn

    from raytrain_adv.ops.experts.find import active_experts, stacked

    experts, heads = stacked(model), output_heads(model)
    active, seen = active_experts(model), set[int]()
    for fqn, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen or module in heads]
        if in_adapter(fqn) or not own:
            continue
        is_matrix = not isinstance(module, nn.Embedding)
        for p in own:
            size = 0 if id(p) in seen else p.numel()  # a tied head multiplies the embedding
            seen.add(id(p))
            products = 0
            if fqn in experts and p.ndim == 3:
                products = int(p.numel() * active)
            elif p.ndim == 2 and is_matrix and fqn not in experts:
                products = p.numel()
            yield (
                COVERED if fqn in covered else _kind(module, fqn in experts, heads),
                size,
                products,
            )


def _kind(module: nn.Module, is_experts: bool, heads: tuple[nn.Module, ...]) -> str:
    from torch import nn

    if is_experts:
        return "experts"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    return "the head" if module in heads else "other modules"
