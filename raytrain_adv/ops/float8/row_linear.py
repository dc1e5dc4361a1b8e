"""torchao's Float8Linear with scales per row, the same numbers by fewer passes over memory."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from raytrain_adv.ops.float8.row_cast import cast_rows, product


@torch._dynamo.allow_in_graph
class _Matmul(torch.autograd.Function):
    """x @ w.t() with float8 factors; backward keeps the input as its transposed cast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, trains_weight: bool) -> Tensor:
        x8 = cast_rows(x, True, trains_weight)
        ctx.save_for_backward(weight, *x8[2:])
        return product(x8[:2], cast_rows(weight, True, False), x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        weight, *x8_t = ctx.saved_tensors
        gradient, grad_weight = gradients[0].contiguous(), None
        gradient8 = cast_rows(gradient, True, bool(x8_t))
        weight8_t = cast_rows(weight, False, True, gradient)
        grad_x = product(gradient8[:2], weight8_t, gradient.dtype, fast=False)
        if x8_t:
            grad_weight = product(gradient8[2:], x8_t, weight.dtype, fast=False)
        return grad_x, grad_weight, None


class RowwiseLinear(nn.Linear):
    """A linear whose three products run in float8 with a scale per row of each factor.

    The numbers are those of torchao 0.18's rowwise Float8Linear, bit for bit (tests/unit/ops,
    tests/gpu).
    """

    @classmethod
    def from_float(cls, linear: nn.Linear, config: object = None) -> Self:
        """Return one that owns a linear's parameters; `config` is for torchao's classes."""
        with torch.device("meta"):
            new = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        new.weight, new.bias = linear.weight, linear.bias
        return new

    def forward(self, input: Tensor) -> Tensor:
        """Return input @ weight.t() + bias: [..., in_features] -> [..., out_features]."""
        trains_weight = torch.is_grad_enabled() and self.weight.requires_grad
        rows = input.reshape(-1, self.in_features)
        output: Tensor = _Matmul.apply(rows, self.weight, trains_weight)  # type: ignore[no-untyped-call]
        output = output.view(*input.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias.to(output.dtype)
