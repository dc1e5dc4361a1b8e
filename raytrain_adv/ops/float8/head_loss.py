"""A head whose logits and loss are bf16's, and whose gradients are products in float8.

The logits stay: in float8 the loss of SmolLM2-135M on real text is 1.5 % higher, that of
Gemma-3-270m 0.8 %, and their heads' weight gradients are 22 and 17 % off, with exact logits 4 and 5
(jobs/benchmarks/head_precision.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrain_adv.ops.float8.cast import (
    E4M3,
    E5M2,
    cast_both,
    cast_padded,
    cast_transposed,
    product,
    scale_of,
)
from raytrain_adv.ops.loss import IGNORE
from raytrain_adv.ops.loss.linear_cross_entropy import (
    LogitMap,
    WeightGradient,
    chunks,
    scaled,
    softmax_gradient_,
)

GROUP = 8192
"""Tokens whose logits' gradients are kept at a time, for one product that gives the weight's: 1 GiB
in float8 for a vocabulary of 128,256."""
MULTIPLE = 16  # of the summed dimension of torch._scaled_mm on a GPU


class Float8Head(nn.Linear):
    """A plain linear, but for the gradients of its loss."""

    key = "fp8_lm_head"
    """The job's key for it."""
    gradients_off = 0.1
    """Largest relative error of the loss's gradients that float8's rounding explains."""

    @classmethod
    def from_float(cls, linear: nn.Linear) -> Float8Head:
        """Return a head that owns the parameters of a linear, bf16 or float32."""
        with torch.device("meta"):
            head = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        head.weight, head.bias = linear.weight, linear.bias
        return head

    def cross_entropy(self, hidden: Tensor, labels: Tensor, logit_map: LogitMap) -> Tensor:
        """Return linear_cross_entropy of this head, with its gradients made in float8.

        The gradient of the logits is in e5m2, weight and hidden states in e4m3, each with one
        scale. Vocabulary and hidden size are multiples of 16.
        """
        trains = torch.is_grad_enabled()
        inputs = (hidden, self.weight, self.bias, labels, logit_map, trains)
        loss: Tensor = _Loss.apply(*inputs)  # type: ignore[no-untyped-call]
        return loss


def workspace(tokens: int, vocab: int, hidden: int) -> int:
    """Return the bytes in float8 while the loss of a pass is computed: the weight, and a group's
    hidden states and gradients of logits.
    """
    return vocab * hidden + min(tokens, GROUP) * (vocab + hidden)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        logit_map: LogitMap,
        trains: bool,
    ) -> Tensor:
        to_x, to_weight, to_bias = [w and trains for w in ctx.needs_input_grad[:3]]
        num_tokens, added = hidden.shape[0], -hidden.shape[0] % MULTIPLE
        x, targets = F.pad(hidden, (0, 0, 0, added)), F.pad(labels, (0, added), value=IGNORE)
        x_scale, w_scale = _scale(x), _scale(weight)
        # No gradient of a logit is larger than what logits are multiplied by.
        scale = scale_of(w_scale.new_tensor(abs(logit_map.scale)), E5M2)
        total = x.new_zeros((), dtype=torch.float32)
        grad_x = torch.empty_like(x) if to_x else None
        weight8_t = cast_transposed(weight, w_scale, E4M3, w_scale) if to_x else weight
        grad_weight = WeightGradient(weight, -(-len(x) // GROUP)) if to_weight else None
        grad_bias = weight.new_zeros(len(weight), dtype=torch.float32) if to_bias else None
        for start in range(0, len(x), GROUP):
            group = slice(start, start + GROUP)
            turned = x.new_empty((len(weight), len(x[group]) * to_weight), dtype=E5M2)
            for part in chunks(len(x[group]), len(weight), x.element_size()):
                rows = F.linear(x[group][part], weight, bias)
                wants = to_x or to_weight or to_bias
                total += softmax_gradient_(rows, targets[group][part], logit_map, wants).sum()
                if grad_bias is not None:
                    grad_bias += rows.sum(0, dtype=torch.float32)
                if to_weight:
                    rows8, turned[:, part] = cast_both(rows, scale, E5M2)
                elif to_x:
                    rows8 = cast_padded(rows, scale, E5M2, len(rows))
                if grad_x is not None:
                    grad_x[group][part] = product(
                        rows8, weight8_t, scale, w_scale, x.dtype, fast=False
                    )
            if grad_weight is not None:
                x8_t = cast_transposed(x[group], x_scale, E4M3, x_scale)
                own = product(turned, x8_t, scale, x_scale, weight.dtype, fast=False)
                grad_weight.add_product(own)
        ctx.gradients = (
            None if grad_x is None else grad_x[:num_tokens],
            None if grad_weight is None else grad_weight.result(),
            None if grad_bias is None else grad_bias.to(weight.dtype),
        )
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*scaled(ctx, gradients[0]), None, None, None)


def _scale(x: Tensor) -> Tensor:
    """Return tensorwise_scale of e4m3 without a copy of the magnitudes."""
    least, most = torch.aminmax(x)
    return scale_of(torch.maximum(-least, most), E4M3)
