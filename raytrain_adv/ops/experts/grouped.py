"""Stacked experts computed by grouped products: each expert's tokens times its own matrix."""

import copy
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401 # registers the operator
from torch import Tensor, nn

from raytrain_adv.ops.experts.find import Layout, known_layout

Factors = tuple[Tensor, Tensor, float]
"""An adapter of one stacked matrix, in the order that it is kept: left [expert, a, rank], right
[expert, rank, b], and what their product is multiplied with."""
ALIGNED = 8
"""Elements of bfloat16 rows that grouped products read together: ranks are filled up to them."""


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Return each expert's rows times its matrix, [rows, in] x [expert, in, out] -> [rows, out].

    Rows are sorted by expert; `ends` [expert], int32, is where each one's end. In bfloat16 one
    kernel, otherwise transformers' operator, a loop, which torch.compile takes as it is.
    """
    if x.dtype == torch.bfloat16:
        return torch._grouped_mm(x, weight, offs=ends)
    product: Tensor = torch.ops.transformers.grouped_mm_fallback(x, weight, offs=ends)
    return product


def grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Return per expert left.t() @ right of its rows: [rows, a], [rows, b] -> [expert, a, b]."""
    if left.dtype == torch.bfloat16:
        return torch._grouped_mm(left.t(), right, offs=ends)
    shape = (len(ends), left.shape[1], right.shape[1])
    weight = left.new_empty(1).expand(shape)  # of which only the shape is read
    backward = torch.ops.transformers.grouped_mm_fallback_backward
    product: Tensor = backward(left, weight, ends, right)[1]
    return product


@torch.library.custom_op("raytrain_adv::in_rows", mutates_args=())
def in_rows(x: Tensor) -> Tensor:
    """Return a contiguous copy, in compiled graphs too: there `contiguous()` leaves the layout to
    Inductor (2.13), which keeps that of the source, and grouped products refuse it.
    """
    return x.clone(memory_format=torch.contiguous_format)


in_rows.register_fake(partial(torch.empty_like, memory_format=torch.contiguous_format))
in_rows.register_autograd(lambda _, gradient: gradient)


def adapted(x: Tensor, factors: Factors, ends: Tensor, transposed: bool) -> Tensor:
    """Return what an adapter adds to a stacked matrix's product with x."""
    left, right, scaling = factors
    first, second = (left, right) if transposed else (right.mT, left.mT)
    missing = -first.shape[2] % ALIGNED
    first, second = F.pad(first, (0, missing)), F.pad(second, (0, 0, 0, missing))
    inner = grouped(x, in_rows(first.to(x.dtype)), ends)
    return grouped(inner, in_rows(second.to(x.dtype)), ends) * scaling


class GroupedExperts(nn.Module):
    """Computes as transformers' experts do with `grouped_mm`, with adapters beside the matrices.

    Subclasses keep or read the matrices in another form. The forward pass of every layout is one
    graph for torch.compile.
    """

    layout: Layout
    original: type[Any]
    """The class it replaces, which has the gate."""
    act_fn: Any
    post_expert_norm: Any

    @classmethod
    def of(cls, module: nn.Module) -> Self:
        """Return one that owns a module's parameters, whose layout is known."""
        layout = known_layout(module)
        new = cls.__new__(cls)
        new.__dict__ = copy.copy(module.__dict__)
        for part in ("_parameters", "_modules", "_buffers"):
            new.__dict__[part] = copy.copy(module.__dict__[part])
        new.layout = layout
        new.original = getattr(module, "original", type(module))
        return new

    def product(self, name: str, x: Tensor, ends: Tensor, factors: Factors | None) -> Tensor:
        """Return x times a stacked matrix, and what its adapter adds: [rows, in] -> [rows, out]."""
        output = self.multiply(name, x, ends)
        if factors is None:
            return output
        return output + adapted(x, factors, ends, self.layout.is_transposed)

    def multiply(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        """Return x times a stacked matrix: [rows, in] -> [rows, out]."""
        weight = getattr(self, name)
        return grouped(x, weight if self.layout.is_transposed else weight.mT, ends)

    def bias_of(self, name: str) -> Tensor:
        """Return the biases of a stacked matrix: [expert, out]."""
        bias: Tensor = getattr(self, f"{name}_bias")
        return bias

    def _mlp(
        self,
        x: Tensor,
        ends: Tensor,
        experts: Tensor | None,
        adapters: dict[str, Factors],
    ) -> Tensor:
        """Return the experts' output for rows that are sorted by expert: [rows, hidden]."""
        up, down = self.layout.matrices
        inner = self.product(up, x, ends, adapters.get(up))
        if self.layout.has_bias:
            inner = inner + self.bias_of(up)[experts]
        if up == "up_proj":
            inner = self.act_fn(inner)
        elif hasattr(self.original, "_apply_gate"):
            inner = self.original._apply_gate(self, inner)
        else:
            gate, other = inner.chunk(2, dim=-1)
            inner = self.act_fn(gate) * other
        output = self.product(down, inner, ends, adapters.get(down))
        if self.layout.has_bias:
            output = output + self.bias_of(down)[experts]
        if getattr(self, "has_post_expert_norm", False):
            output = self.post_expert_norm(output)
        return output

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
        **adapters: Factors,
    ) -> Tensor:
        """Return the weighted sum of each token's experts: [tokens, hidden] -> the same.

        Source: transformers 5.23, grouped_mm_experts_forward; without its expert parallelism.
        """
        count = int(getattr(self, self.layout.down).shape[0])
        if top_k_index is None or top_k_weights is None:  # every expert's tokens in turn
            each = hidden_states.shape[0] // count
            ends = torch.arange(1, count + 1, device=hidden_states.device) * each
            return self._mlp(hidden_states, ends.to(torch.int32), None, adapters)
        num_tokens, top_k = top_k_index.shape
        experts, order = torch.sort(top_k_index.reshape(-1))
        # histc counts floats on a CPU, and integers alone on a GPU when it must be deterministic.
        counted = experts.int() if experts.is_cuda else experts.float()
        ends = torch.histc(counted, bins=count, min=0, max=count - 1).cumsum(0, dtype=torch.int32)
        output = self._mlp(hidden_states[order // top_k], ends, experts, adapters)
        output = output * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=order.device)
        # A sum over an axis adds in one order, as index_add_ on a GPU does not.
        summed = output[back].view(num_tokens, top_k, -1).sum(dim=1)
        return summed.to(hidden_states.dtype)
