"""Stacked experts that compute with the values a quantized model would have."""

from typing import Any

import torch
from torch import Tensor, nn

from raytrain_adv.ops.experts.find import matrices, stacked
from raytrain_adv.ops.experts.grouped import GroupedExperts, grouped, grouped_outer
from raytrain_adv.ops.fake_quant.layers import rounded_activation, rounded_weight
from raytrain_adv.ops.fake_quant.rounding import BITS, through, through_groups
from raytrain_adv.ops.fake_quant.targets import FLOAT8

WEIGHTS_AT_ONCE = 2**27
"""Weights whose gradient is passed through their rounding together."""


@torch._dynamo.allow_in_graph
class _Product(torch.autograd.Function):
    """Grouped product of rounded factors; backward rounds again rather than keep them.

    x is [rows, in], weight [expert, out, in]; with float8 activations too the rounded values are
    multiplied in x's dtype, on any device.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        ends: Tensor,
        weight_dtype: str,
        group_size: int,
        activation_dtype: str,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        ctx.kinds = (weight_dtype, group_size, activation_dtype)
        rounded, _ = _rounded(weight, weight_dtype, group_size)
        return grouped(rounded_activation(x, activation_dtype)[0], rounded.mT, ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends = ctx.saved_tensors
        weight_dtype, group_size, activation_dtype = ctx.kinds
        gradient = gradients[0].contiguous()
        grad_x = grad_weight = None
        rounded, weight_scale = _rounded(weight, weight_dtype, group_size, gradient)
        rounded_x, scale, zero_point = rounded_activation(x, activation_dtype, gradient)
        if ctx.needs_input_grad[0]:
            grad_x = grouped(gradient, rounded, ends)
            if scale is not None and zero_point is not None:
                grad_x = through(grad_x, x, scale, zero_point, 8)
        if ctx.needs_input_grad[1]:
            grad_weight = grouped_outer(gradient, rounded_x, ends)
            if weight_scale is not None:
                _pass_through(grad_weight, weight, weight_scale, BITS[weight_dtype])
        return grad_x, grad_weight, None, None, None, None


def _rounded(
    weight: Tensor, dtype: str, group_size: int, after: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return stacked matrices rounded row by row, and their scales, [rows of all, groups]."""
    rows = weight.reshape(-1, weight.shape[-1])
    rounded, scale = rounded_weight(rows, dtype, group_size, after)
    return rounded.view(weight.shape), scale


def _pass_through(gradient: Tensor, weight: Tensor, scale: Tensor, bits: int) -> None:
    """Change a gradient to the one straight through the rounding, part by part, in place."""
    width = weight.shape[-1]
    flat = (gradient.view(-1, width), weight.reshape(-1, width), scale)
    parts = (torch.split(t, max(1, WEIGHTS_AT_ONCE // width)) for t in flat)
    for rows, of, scales in zip(*parts, strict=True):
        rows.copy_(through_groups(rows, of, scales, bits))


class FakeQuantizedExperts(GroupedExperts):
    """Experts that multiply rounded activations with rounded weights."""

    weight_dtype: str
    group_size: int | None
    activation_dtype: str
    rounds: bool
    """Whether it rounds now, or computes as plain experts."""

    @classmethod
    def rounding(
        cls, module: nn.Module, weight_dtype: str, group_size: int | None, activation_dtype: str
    ) -> "FakeQuantizedExperts":
        """Return one that owns a module's parameters; see FakeQuantizedLinear.of."""
        new = cls.of(module)
        new.weight_dtype, new.activation_dtype = weight_dtype, activation_dtype
        new.group_size, new.rounds = group_size, True
        return new

    def multiply(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        """Return rounded x times a rounded stacked matrix: [rows, in] -> [rows, out]."""
        if not self.rounds:
            return super().multiply(name, x, ends)
        weight = getattr(self, name)
        weight = weight.mT.contiguous() if self.layout.is_transposed else weight
        size = self.group_size or x.shape[-1]
        output: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x, weight, ends, self.weight_dtype, size, self.activation_dtype
        )
        return output


class QuantizedExperts(GroupedExperts):
    """Experts whose matrices are torchao's tensors: they are unpacked for each product, and
    activations are rounded as in training.
    """

    def multiply(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        """Return x times an unpacked stacked matrix: [rows, in] -> [rows, out]."""
        held = getattr(self, name)
        weight = held.dequantize()
        if self.layout.is_transposed:  # in memory as in training: kernels add in its order
            weight = weight.mT.contiguous()
        return grouped(rounded_activation(x, activation_dtype(held))[0], weight.mT, ends)


def activation_dtype(held: Any) -> str:
    """Return what a torchao tensor has activations rounded to; empty for nothing."""
    if getattr(held, "act_quant_kwargs", None) is not None:
        return FLOAT8
    return "int8" if getattr(held, "activation_quantization", None) is not None else ""


def compute_experts(model: nn.Module) -> nn.Module:
    """Compute a model's experts from torchao's tensors, which transformers loads and torchao
    cannot multiply in groups; adapters on them stay. Call it on what from_pretrained returns.
    """
    from raytrain_adv.ops.experts.adapted import adapt

    for fqn, module in stacked(model).items():
        if not all(hasattr(p, "qdata") for p in matrices(module).values()):
            continue
        model.set_submodule(fqn, QuantizedExperts.of(module))
        outer = fqn
        while outer.endswith(".base_layer"):
            outer = outer.removesuffix(".base_layer")
        if outer != fqn:
            adapt(model, outer)
    return model
