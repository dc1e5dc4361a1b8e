"""The memory that a decoder layer keeps for its backward pass, computed from its modules.

- eager: autograd keeps what each operation needs. An RMSNorm computes in float32 and keeps that
  copy and its normalized form; attention its inputs, output and log-sum-exp; a gated MLP the gate,
  its activation, the other half and their product.
- compiled: Inductor's partitioner keeps the inputs of matrix products, attention's inputs and the
  halves of the MLP, and recomputes element-wise results. Of a norm it keeps the input unchanged.
- selective checkpointing: the results of matrix products and attention, and the layer's input;
  attention checkpointing: the layer's input, attention's output and log-sum-exp; full
  checkpointing: the layer's input only.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from raytrain_adv.estimate.flops import ROUTED_EXPERT
from raytrain_adv.ops.experts.find import (
    active_expert_share,
    experts_per_token,
    matrices,
    shapes,
    stacked,
)
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
    keeps_input: bool  # backward needs the input: its weight, or an adapter on it, is trained
    adapter_rank: int = 0
    keeps_bytes: bool = False  # of the input it keeps a float8 copy of its own

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
class Norm:
    """A normalization of a layer."""

    width: float  # elements per token
    in_float32: bool  # whether it computes on a float32 copy, as transformers' RMSNorms do
    trained: bool


@dataclass(frozen=True)
class Layer:
    """The shapes of a decoder layer that determine its activations."""

    hidden: int
    heads: int
    query_width: int  # elements per token of all queries, and of attention's output
    key_width: int  # elements per token of all keys; the same for the values
    linears: tuple[Linear, ...]
    norms: tuple[Norm, ...]
    routed: float = 0.0  # elements per token of all active experts' outputs, before they are summed
    gate_copies: float = 0.0  # elements per token that an unusual gate of experts keeps too

    def linear_inputs(self, size: int, compiled: bool) -> float:
        """Return the bytes per token of the linears' inputs; an input of several linears counts
        once, and so does its float8 copy in a compiled layer.
        """
        # The input of attention's output projection is counted as attention's output.
        kept = [m for m in self.linears if m.keeps_input and (m.keeps_bytes or not m.is_output)]
        shared = {
            (
                m.fqn if m.keeps_bytes and not compiled else m.fqn.rpartition(".")[0],
                m.in_width,
                m.keeps_bytes,
            ): m.in_width * (1 if m.keeps_bytes else size)
            for m in kept
        }
        return sum(shared.values()) + size * sum(m.adapter_rank for m in self.linears)

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

    def attention(self, size: int, kind: AttentionKind, seq_len: int) -> float:
        """Return the bytes per token that attention keeps: inputs, output and weights."""
        if kind == "fused":
            # Values cut from a joint projection keep all of it alive.
            is_joint = sum(m.is_attention and not m.is_output for m in self.linears) == 1
            copies = 3 if is_joint else 2
            return size * copies * (self.query_width + self.key_width) + 4 * self.heads
        # Keys and values are repeated for every head.
        inputs_and_output = size * 4 * self.query_width
        if kind == "masked":
            return inputs_and_output + 4 * self.heads + size * seq_len
        # The softmax is float32, then cast.
        return inputs_and_output + self.heads * seq_len * (4 + size if size < 4 else 4)

    def kept_eager(self, size: int, kind: AttentionKind, seq_len: int) -> float:
        """Return the bytes per token that autograd keeps for each operation."""
        norms = sum(
            norm.width * (4 + size * norm.trained if norm.in_float32 else size)
            for norm in self.norms
        )
        is_gated = self.mlp_inner > 1.5 * self.mlp_width
        mlp = self.mlp_inner + (self.mlp_width if is_gated else 0)
        experts = self.routed + self.gate_copies
        return (
            norms
            + self.linear_inputs(size, compiled=False)
            + size * (mlp + experts)
            + self.attention(size, kind, seq_len)
        )

    def kept_compiled(self, size: int, kind: AttentionKind, seq_len: int) -> float:
        """Return the bytes per token kept by a compiled layer."""
        kept = sum(norm.width for norm in self.norms) + self.mlp_inner
        kept += self.routed  # which the routers' weights are multiplied with
        inputs = self.linear_inputs(size, compiled=True)
        return size * kept + inputs + self.attention(size, kind, seq_len)

    def kept_selective(self, size: int, compiled: bool) -> float:
        """Return the bytes per token kept by selective checkpointing."""
        results = sum(m.out_width * (2 if m.adapter_rank else 1) for m in self.linears)
        if compiled:
            results -= self.hidden  # the MLP's result, which backward does not need
        return size * (self.hidden + results + self.query_width) + 4 * self.heads

    def backward_temporaries(self, size: int, kind: AttentionKind, seq_len: int) -> float:
        """Return the bytes per token that a layer's backward pass needs in addition: the larger of
        the MLP's gradients (product, halves, input, output) and attention's.
        """
        mlp = size * (self.mlp_width + self.mlp_inner + 2 * self.hidden)
        attention = size * (2 * self.query_width + 2 * self.key_width + self.hidden)
        attention += self.heads * seq_len * (8 + size) if kind == "eager" else 4 * self.query_width
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
    norms = tuple(_norms(layer, query_width, key_width))
    routed, gates = _routed(layer, config)
    sizes = (config.hidden_size, heads, query_width, key_width)
    return Layer(*sizes, linears, norms, routed, gates)


def _routed(layer: nn.Module, config: PretrainedConfig) -> tuple[float, float]:
    """Return the elements per token of active experts' outputs, and of what gates of their own keep
    (gpt-oss: clamped halves, a sigmoid, two products).
    """
    outputs = gates = 0.0
    for module in stacked(layer).values():
        active, held = experts_per_token(config), shapes(module)
        outputs += active * config.hidden_size
        kind = vars(module).get("original", type(module))
        gate = getattr(kind, "_apply_gate", None)
        if gate is not None and gate.__module__ == kind.__module__:
            matrix = held["down_proj"][1:]
            gates += 4 * active * next((n for n in matrix if n != config.hidden_size), matrix[0])
    return outputs, gates


def _linears(layer: nn.Module, config: PretrainedConfig) -> Iterator[Linear]:
    for fqn, module in stacked(layer).items():
        for name in shapes(module):
            yield _stacked_experts(layer, fqn, name, config)
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
        rank = _adapter_rank(layer, fqn)
        trained = module.weight.requires_grad or fqn.endswith(".base_layer")
        name = fqn.removesuffix(".base_layer")
        in_bytes = module.weight.requires_grad and getattr(module, "keeps_bytes", False)
        yield Linear(name, width_in * share, width_out * share, trained, rank, in_bytes)


def _stacked_experts(layer: nn.Module, fqn: str, name: str, config: PretrainedConfig) -> Linear:
    """Return experts stacked as [expert, out, in], or transposed, as one linear."""
    module = layer.get_submodule(fqn)
    active, hidden = experts_per_token(config), config.hidden_size
    count, *matrix = shapes(module)[name]
    widths = (hidden, next((n for n in matrix if n != hidden), hidden))
    width_in, width_out = widths[::-1] if "down" in name else widths
    rank = 0
    while fqn.endswith(".base_layer"):  # an adapter of each matrix around the last one's
        fqn = fqn.removesuffix(".base_layer")
        wrapper: Any = layer.get_submodule(fqn)
        if wrapper.parameter_name == name:
            rank += sum(p.shape[0] // count for p in wrapper.lora_A.parameters())
    own = matrices(module)
    trained = rank > 0 or (name in own and own[name].requires_grad)
    return Linear(f"{fqn}.{name}", active * width_in, active * width_out, trained, active * rank)


def _adapter_rank(layer: nn.Module, fqn: str) -> int:
    if not fqn.endswith(".base_layer"):
        return 0
    adapted = layer.get_submodule(fqn.removesuffix(".base_layer"))
    return sum(p.shape[0] for name, p in adapted.named_parameters() if name.startswith("lora_A."))


def _norms(layer: nn.Module, query_width: int, key_width: int) -> Iterator[Norm]:
    for fqn, module in layer.named_modules():
        if "norm" not in type(module).__name__.lower() or next(module.children(), None):
            continue
        weight = next(iter(module.parameters(recurse=False)), None)
        if weight is None:
            continue
        name, width = fqn.rpartition(".")[2], weight.numel()
        if name.startswith(("q_", "k_", "query_", "key_")):  # inside attention
            width = query_width if name.startswith("q") else key_width
        yield Norm(width, not isinstance(module, nn.LayerNorm), weight.requires_grad)
