"""A linear whose factors are rounded to what the quantized model holds, multiplied in float8.

Float8 changes a product of normally distributed factors by 3.7 % (tests/unit/ops), integer weights
of at most four bits by 9.5 % and more, those of eight by 1 %. So only the first, and factors that
are rounded to float8, are multiplied in float8 in forward. Both products of backward always are.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrain_adv.errors import JobError
from raytrain_adv.ops.fake_quant.layers import (
    FakeQuantizedLinear,
    Scheme,
    float8_product,
    rounded_activation,
    rounded_weight,
)
from raytrain_adv.ops.fake_quant.rounding import BITS, bounds, through_groups
from raytrain_adv.ops.fake_quant.targets import FLOAT8
from raytrain_adv.ops.float8.cast import (
    E4M3,
    E5M2,
    cast,
    cast_both,
    cast_transposed,
    product,
    scale_of,
    tensorwise_scale,
)
from raytrain_adv.ops.float8.linear import linear
from raytrain_adv.ops.views import unalias

ROUNDING = {"int2": "47 %", "int3": "20 %", "int4": "9.5 %", "int8": "1 %"}
"""What weights in groups of 32 and int8 activations change of a product, as a share of its norm."""
OWN_ROUNDING = "3.7 %"  # what float8 adds to it


def is_coarse(weight_dtype: str) -> bool:
    """Whether weights are rounded more than float8 rounds, and multiplied in it in forward too."""
    return BITS.get(weight_dtype, 8) <= 4


def is_forward_in_float8(weight_dtype: str, activation_dtype: str) -> bool:
    """Whether the forward product is computed in float8, and not backward's two alone."""
    return is_coarse(weight_dtype) or weight_dtype == activation_dtype == FLOAT8


def described(weight_dtype: str, activation_dtype: str) -> str:
    """Return what is computed in float8, and what that does to the numbers."""
    exact = "evaluation is exact, as the exported model computes"
    if is_coarse(weight_dtype):
        return (
            f"all three products are in FP8, which rounds them by {OWN_ROUNDING} besides the "
            f"{ROUNDING[weight_dtype]} of {weight_dtype} weights in groups of 32; {exact}"
        )
    if is_forward_in_float8(weight_dtype, activation_dtype):
        return f"all three products are in FP8, forward as the exported model computes it; {exact}"
    known = f" and {weight_dtype} by {ROUNDING[weight_dtype]}" if weight_dtype in ROUNDING else ""
    return (
        "gradients are in FP8, and forward passes are not: FP8 would round them by "
        f"{OWN_ROUNDING}{known}; {exact}"
    )


def refuse_frozen(linears: Iterable[nn.Linear], weight_dtype: str, activation_dtype: str) -> None:
    """Refuse linears of which one product of three would be in float8, or none. Raises JobError
    when their weights are frozen, and their forward pass stays out of float8.
    """
    frozen = sum(not linear.weight.requires_grad for linear in linears)
    if frozen and not is_forward_in_float8(weight_dtype, activation_dtype):
        raise JobError(
            f"FP8 has little to do beside QAT with {weight_dtype} weights under LoRA",
            f"{frozen} linears are frozen, so that they have no weight gradient, and their forward "
            f"pass stays exact: FP8 would round more than {weight_dtype}",
            "set fp8: false, or qat_weight_dtype: int4",
        )


@torch._dynamo.allow_in_graph
class _Product(torch.autograd.Function):
    """x @ weight.t(), both factors rounded; keeps the input's transposed cast and the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        trains_weight: bool,
        scheme: Scheme,
    ) -> Tensor:
        weight_dtype, group_size, activation_dtype = scheme
        rounded_x, ranges, zero_points = rounded_activation(x, activation_dtype)
        rounded, scales = rounded_weight(weight, weight_dtype, group_size)
        x_scale = _scale(rounded_x, ranges, zero_points, 8)
        x8 = x8_t = None
        if trains_weight:
            x8, x8_t = cast_both(rounded_x, x_scale, E4M3)
        ctx.kinds = (trains_weight, weight_dtype, group_size)
        ctx.save_for_backward(x8_t, x_scale, weight)
        if not is_coarse(weight_dtype) or scales is None:
            if weight_dtype == activation_dtype == FLOAT8:
                return float8_product(x, weight, bias)
            return unalias(F.linear(rounded_x, rounded, bias))
        x8 = cast(rounded_x, x_scale, E4M3) if x8 is None else x8
        if scales.shape[1] > 1:
            scale = _scale(rounded, scales, None, BITS[weight_dtype])
            out = product(x8, cast(rounded, scale, E4M3), x_scale, scale, x.dtype, fast=True)
        else:
            # One scale per row of the weight: its integers are exact in float8, and the scales are
            # those of the output's columns.
            integers = torch.round(rounded.float() / scales.float()).to(E4M3)
            one = torch.ones_like(x_scale)
            out = product(x8, integers, x_scale, one, x.dtype, fast=True) * scales.t()
        return out if bias is None else out + bias

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x8_t, x_scale, weight = ctx.saved_tensors
        trains_weight, weight_dtype, group_size = ctx.kinds
        gradient = gradients[0].contiguous()
        scale = tensorwise_scale(gradient, E5M2)
        rounded, scales = rounded_weight(weight, weight_dtype, group_size, scale)
        weight_scale = _scale(rounded, scales, None, BITS.get(weight_dtype, 8))
        weight8_t = cast_transposed(rounded, weight_scale, E4M3, scale)
        grad_weight = None
        if trains_weight:
            gradient8, gradient8_t = cast_both(gradient, scale, E5M2)
            grad_weight = product(gradient8_t, x8_t, scale, x_scale, weight.dtype, fast=False)
            if scales is not None:
                grad_weight = through_groups(grad_weight, weight, scales, BITS[weight_dtype])
        else:
            gradient8 = cast(gradient, scale, E5M2)
        # Straight through the rounding of activations: their range holds all of them.
        grad_x = product(gradient8, weight8_t, scale, weight_scale, gradient.dtype, fast=False)
        grad_bias = gradient.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None


def _scale(rounded: Tensor, scales: Tensor | None, zero_points: Tensor | None, bits: int) -> Tensor:
    """Return what maps a rounded tensor into float8's range; scales bound integers."""
    if scales is None:
        return tensorwise_scale(rounded, E4M3)
    smallest, largest = bounds(bits)
    reach: Tensor | int = -smallest
    if zero_points is not None:
        zero = zero_points.to(torch.float32)
        reach = torch.maximum(zero - smallest, largest - zero)
    return scale_of((scales.to(torch.float32) * reach).max(), E4M3)


class Float8FakeQuantizedLinear(FakeQuantizedLinear):
    """A linear that trains in float8, with rounded factors while it rounds.

    In evaluation it is a FakeQuantizedLinear, which computes what the exported model does.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return input @ weight.t() + bias: [..., in_features] -> [..., out_features]."""
        if not self.training:
            return super().forward(input)
        trains_weight = torch.is_grad_enabled() and self.weight.requires_grad
        if not self.rounds:
            return linear(input, self.weight, self.bias, trains_weight)
        output: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            input.reshape(-1, self.in_features), self.weight, self.bias, trains_weight, self.scheme
        )
        return output.view(*input.shape[:-1], self.out_features)
