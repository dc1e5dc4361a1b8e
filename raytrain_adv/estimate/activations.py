"""The widths of a decoder layer's modules, and what its backward pass needs besides what it keeps;
counted.py has what it keeps.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from raytrain_adv.estimate.counted import Kept
from raytrain_adv.estimate.flops import ROUTED_EXPERT
from raytrain_adv.ops.experts.find import active_expert_share, experts_per_token, shapes, stacked
from raytrain_adv.transforms.modules import in_adapter

AttentionKind = Literal["fused", "masked", "eager"]
"""Fused: no mask but the causal one. Masked: fused with a mask tensor. Eager: all weights exist."""

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
DOWN_PROJECTIONS = ("down", "w2", "fc2", "c_proj", "dense_4h_to_h", "fc_out")
ATTENTION_PATH = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass(frozen=True)
class Linear:
    """A matrix product of a layer."""

    fqn: str
    in_width: float  # input elements per token; of routed experts, summed over the active ones
    out_width: float  # output elements, likewise

    @property
    def is_attention(self) -> bool:
        """Whether it belongs to the layer's attention."""
        return ATTENTION_PATH.search(self.fqn) is not None

    @property
    def is_output(self) -> bool:
        """Whether it is attention's last projection."""
        return self.is_attention and self.fqn.rpartition(".")[2] in OUTPUT_PROJECTIONS

    @property
    def is_down(self) -> bool:
        """Whether it is the MLP's last matrix."""
        return not self.is_attention and self.fqn.rpartition(".")[2].startswith(DOWN_PROJECTIONS)


@dataclass(frozen=True)
class Layer:
    """The shapes of a decoder layer that determine its activations."""

    hidden: int
    heads: int
    query_width: int  # elements per token of all queries, and of attention's output
    key_width: int  # elements per token of all keys; the same for the values
    linears: tuple[Linear, ...]

    @cached_property
    def mlp_inner(self) -> float:
        """Elements per token between the MLP's matrices: gate and up, or up alone."""
        return sum(m.out_width for m in self.linears if not m.is_attention and not m.is_down)

    @cached_property
    def mlp_width(self) -> float:
        """Input elements per token of the MLP's last matrix."""
        return sum(m.in_width for m in self.linears if m.is_down)

    def on_tiles(self, mlp: str, share: float) -> "Layer":
        """Return the layer with a share of the tokens at a time between the MLP's matrices."""
        linears = [
            replace(m, in_width=m.in_width * share)
            if m.is_down
            else replace(m, out_width=m.out_width * share)
            for m in self.linears
            if m.fqn.startswith(f"{mlp}.")
        ]
        others = [m for m in self.linears if not m.fqn.startswith(f"{mlp}.")]
        return replace(self, linears=(*others, *linears))

    def between(self, compiled: bool) -> float:
        """Return the elements per token that are kept of what is between the MLP's matrices."""
        is_gated = self.mlp_inner > 1.5 * self.mlp_width
        return self.mlp_inner + self.mlp_width * (1 if compiled or not is_gated else 2)

    def guess(self, size: int) -> Kept:
        """Return what a layer keeps whose code cannot be counted: inputs and results of products,
        and attention.
        """
        results = size * sum(m.out_width for m in self.linears)
        inputs = size * sum(m.in_width for m in self.linears)
        attention = size * self.query_width
        products = results + attention + 4 * self.heads
        every = products + inputs + size * (2 * self.hidden + 2 * self.query_width)
        return Kept(every, every, products, products, attention, 4 * self.heads, 0.0)

    def backward_temporaries(
        self, size: int, kind: AttentionKind, seq_len: int, compiled: bool
    ) -> float:
        """Return the bytes per token that a layer's backward pass needs in addition: the larger of
        the MLP's gradients (product, halves, input, output) and attention's. Eager attention has
        scores in float32, unless what casts them is compiled.
        """
        mlp = size * (self.mlp_width + self.mlp_inner + 2 * self.hidden)
        attention = size * (2 * self.query_width + 2 * self.key_width + self.hidden)
        scores = self.heads * seq_len * (3 * size if compiled else 8 + size)
        attention += scores if kind == "eager" else 4 * self.query_width
        return max(mlp, attention) + 8 * self.hidden


def read_layer(layer: nn.Module, config: PretrainedConfig) -> Layer:
    """Return a decoder layer's shapes; it may have adapters."""
    linears = tuple(_linears(layer, config))
    heads = getattr(config, "num_attention_heads", 0)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    query_width = next((int(m.in_width) for m in linears if m.is_output), heads * head_dim)
    key_width = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    if nope := getattr(config, "qk_nope_head_dim", None):
        # Multi-head latent attention keeps queries and keys, joined from two parts each, and the
        # projection that keys and values are cut from.
        joined, value = nope + config.qk_rope_head_dim, config.v_head_dim
        key_width = (heads * (2 * joined + nope + value) - query_width) // 2
    return Layer(config.hidden_size, heads, query_width, key_width, linears)


def _linears(layer: nn.Module, config: PretrainedConfig) -> Iterator[Linear]:
    for fqn, module in stacked(layer).items():
        for name in shapes(module):
            yield _stacked_experts(module, fqn, name, config)
    for fqn, module in layer.named_modules():
        if in_adapter(fqn):
            continue
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        share = active_expert_share(config) if ROUTED_EXPERT.search(fqn) else 1.0
        if isinstance(module, nn.Linear):  # whose weight may be packed
            width_in, width_out = module.in_features, module.out_features
        else:
            width_in, width_out = module.weight.shape
        yield Linear(fqn.removesuffix(".base_layer"), width_in * share, width_out * share)


def _stacked_experts(module: nn.Module, fqn: str, name: str, config: PretrainedConfig) -> Linear:
    """Return experts stacked as [expert, out, in], or transposed, as one linear."""
    active, hidden = experts_per_token(config), config.hidden_size
    matrix = shapes(module)[name][1:]
    widths = (hidden, next((n for n in matrix if n != hidden), hidden))
    width_in, width_out = widths[::-1] if "down" in name else widths
    name = f"{fqn.replace('.base_layer', '')}.{name}"
    return Linear(name, active * width_in, active * width_out)
