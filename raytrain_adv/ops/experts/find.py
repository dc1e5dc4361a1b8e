"""Find stacked experts and routers by what they are: modules that own one matrix per expert, and
the linears beside them that choose among these.
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from raytrain_adv.errors import JobError

ROUTER_PATH = re.compile(r"(^|\.)(\w*_)?(gate|gating|router)(\.|$)")
"""Modules beside experts that choose among them; `gate_proj` is not such a name."""
ROUTER, COUNTS = {"gate", "gating", "router"}, ("num_experts", "num_routed_experts")
SORTED, TOP_K = ["hidden_states"], ["hidden_states", "top_k_index", "top_k_weights"]
"""What the forward passes of known layouts take."""


@dataclass(frozen=True)
class Layout:
    """How a module keeps and calls its experts' two matrices."""

    up: str
    """The parameter of the first matrix: gate_up_proj, or up_proj without a gate."""
    down: str
    is_transposed: bool
    """Whether matrices are [expert, in, out] instead of [expert, out, in]."""
    has_bias: bool = False

    def width(self, matrix: tuple[int, int, int]) -> int:
        """Return the input features of a stacked matrix of this shape."""
        return matrix[1] if self.is_transposed else matrix[2]

    @property
    def matrices(self) -> tuple[str, str]:
        """The names of both parameters."""
        return self.up, self.down


def stacked(model: nn.Module) -> dict[str, nn.Module]:
    """Return by fqn the modules that own experts as 3-D parameters, one matrix per expert."""
    return {fqn: m for fqn, m in model.named_modules() if _num_experts(m)}


def matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return a module's stacked matrices, one per expert, by name."""
    own = dict(module.named_parameters(recurse=False))
    return {name: p for name, p in own.items() if p.ndim == 3}


def shapes(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Return the shapes of a module's stacked matrices, packed ones as what they stand for."""
    known: dict[str, tuple[int, int, int]] | None = vars(module).get("packed_shapes")
    if known is not None:
        return known
    return {name: (p.shape[0], p.shape[1], p.shape[2]) for name, p in matrices(module).items()}


def _num_experts(module: nn.Module) -> int:
    """Return how many experts a module owns as stacked matrices; 0 if it owns none.

    A convolution's weight has three axes too, and so have recurrent layers' gates per head.
    """
    if type(module).__module__.startswith("torch.nn."):
        return 0
    if "packed_shapes" in vars(module):
        return next(iter(shapes(module).values()))[0]
    held = {p.shape[0] for p in matrices(module).values()}
    counts = {vars(module).get(key) for key in COUNTS} - {None}
    return next(iter(held)) if len(held) == 1 and held <= counts else 0


def blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Yield the modules that hold experts and what routes to them, with the number of experts."""
    counts = expert_modules(model)
    for fqn, module in model.named_modules():
        parent, _, name = fqn.rpartition(".")
        count = counts.get(fqn, 0)
        if name == "experts" and not count:  # one by one, or as DBRX's and LongCat's are kept
            held = [vars(module).get(key) or 0 for key in COUNTS]
            count = len(module) if isinstance(module, nn.ModuleList) else max(held)
        if count > 1:
            yield parent, model.get_submodule(parent), count


def expert_modules(model: nn.Module) -> dict[str, int]:
    """Return by fqn how many experts the modules have that own them as stacked matrices, or wrap
    such modules in adapters.
    """
    named = ((fqn, _num_experts(_unwrapped(module))) for fqn, module in model.named_modules())
    return {fqn: count for fqn, count in named if count and not fqn.endswith("base_layer")}


def _unwrapped(module: nn.Module) -> nn.Module:
    inner = getattr(module, "base_layer", None)
    return _unwrapped(inner) if isinstance(inner, nn.Module) else module


def routers(model: nn.Module) -> frozenset[str]:
    """Return the fqns of what chooses experts, or whether the shared one is used: linears, and
    modules of their own class that hold a weight as theirs. A router may be several linears (Zaya),
    and have more outputs than experts (LongCat).
    """
    found: set[str] = set()
    for parent, block, count in blocks(model):
        for fqn, module in block.named_modules():
            weight = module._parameters.get("weight")
            rows = len(weight) if weight is not None and weight.ndim == 2 else 0
            is_inside = rows > 0 and fqn.partition(".")[0] in ROUTER
            is_one = getattr(module, "out_features", rows) in (1, count) and ROUTER_PATH.search(fqn)
            if is_inside or is_one:
                found.add(f"{parent}.{fqn}".lstrip("."))
    return frozenset(found)


def layout_of(module: nn.Module) -> Layout | None:
    """Return how a module keeps its experts; none if it computes in a way that is not known."""
    own: Any = module
    if isinstance(known := vars(module).get("layout"), Layout):
        return known
    held = matrices(module)
    up = next((name for name in ("gate_up_proj", "up_proj") if name in held), "")
    if held.keys() != {up, "down_proj"}:
        return None
    is_gated = up == "gate_up_proj"
    first, (outer, inner) = tuple(held[up].shape[1:]), held["down_proj"].shape[1:]
    forms = {False: (inner * (1 + is_gated), outer), True: (inner, outer * (1 + is_gated))}
    fits = [transposed for transposed, shape in forms.items() if shape == first]
    is_transposed = getattr(own, "is_transposed", fits[0] if len(fits) == 1 else None)
    takes = list(inspect.signature(type(module).forward).parameters)[1:]
    if is_transposed not in fits:
        return None
    has_bias = bool(getattr(own, "has_bias", False))
    # What transformers dispatches takes the same three, whatever their names.
    is_known = takes in (SORTED, TOP_K) or (hasattr(own, "has_gate") and len(takes) == len(TOP_K))
    return Layout(up, "down_proj", is_transposed, has_bias) if is_known else None


def known_layout(module: nn.Module) -> Layout:
    """Return how a module keeps its experts. Raises JobError when it computes in a way that is not
    known.
    """
    if (layout := layout_of(module)) is not None:
        return layout
    raise JobError(
        "Experts of this model are computed in a way that raytrain_adv does not know",
        f"{type(module).__module__}.{type(module).__qualname__}, with "
        + ", ".join(f"{name} {[*p.shape]}" for name, p in matrices(module).items()),
        "install the version of transformers in constraints.txt, or leave the experts as they are",
    )


def widths_of(module: nn.Module) -> dict[str, int]:
    """Return the input features of each stacked matrix of a module whose layout is known."""
    layout = known_layout(module)
    return {name: layout.width(shape) for name, shape in shapes(module).items()}


def active_experts(model: nn.Module) -> float:
    """Return the share of routed experts that are active for a token; 1 without a mixture."""
    config = getattr(model, "config", None)
    return 1.0 if config is None else active_expert_share(config.get_text_config())


def active_expert_share(config: PretrainedConfig) -> float:
    """Return the share of routed experts that are active for a token; 1 without a mixture."""
    experts = num_experts(config)
    return experts_per_token(config) / experts if experts else 1.0


def num_experts(config: PretrainedConfig) -> int:
    """Return the number of routed experts per layer; its key depends on the architecture."""
    keys = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    held = getattr(config, "ffn_config", config)  # DBRX's
    counts = (getattr(held, key, None) for key in keys)
    return next((count for count in counts if isinstance(count, int) and count > 1), 0)


def experts_per_token(config: PretrainedConfig) -> int:
    """Return the number of active routed experts per token."""
    keys = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
    held = getattr(config, "ffn_config", config)
    counts = (getattr(held, key, None) for key in (*keys, "moe_top_k"))
    return next((count for count in counts if isinstance(count, int)), 1)
