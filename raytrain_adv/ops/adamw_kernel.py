"""The Triton kernel of AdamW: parameter, gradient and both moments in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def _adamw(  # type: ignore[no-untyped-def] # its arguments are not Python values
    parameter,
    gradient,
    exp_avg,
    exp_avg_sq,
    factor,
    numel,
    learning_rate,
    decay,
    beta1,
    beta2,
    correction1,
    correction2_sqrt,
    epsilon,
    CLIPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numel
    g = tl.load(gradient + index, mask=inside).to(tl.float32)
    if CLIPS:
        g *= tl.load(factor)
    p = tl.load(parameter + index, mask=inside).to(tl.float32)
    m = tl.load(exp_avg + index, mask=inside).to(tl.float32)
    v = tl.load(exp_avg_sq + index, mask=inside).to(tl.float32)
    p -= learning_rate * decay * p
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    p -= (learning_rate / correction1) * m / (tl.sqrt(v) / correction2_sqrt + epsilon)
    tl.store(parameter + index, p.to(parameter.dtype.element_ty), mask=inside)
    tl.store(exp_avg + index, m.to(exp_avg.dtype.element_ty), mask=inside)
    tl.store(exp_avg_sq + index, v.to(exp_avg_sq.dtype.element_ty), mask=inside)


def adamw_step(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    factor: Tensor | None,
    step: int,
    group: Mapping[str, Any],
) -> None:
    """Do AdamW's step number `step` (from 1) in place, on contiguous tensors of one shape, with the
    numbers of an optimizer's parameter group.

    Source: https://arxiv.org/abs/1711.05101; torch's fused kernel for the order of operations.
    """
    numel, (beta1, beta2) = parameter.numel(), group["betas"]
    if numel == 0:
        return
    _adamw[(triton.cdiv(numel, BLOCK),)](
        parameter,
        gradient,
        exp_avg,
        exp_avg_sq,
        gradient if factor is None else factor,
        numel,
        float(group["lr"]),
        group["weight_decay"],
        beta1,
        beta2,
        1.0 - beta1**step,
        (1.0 - beta2**step) ** 0.5,
        group["eps"],
        CLIPS=factor is not None,
        BLOCK=BLOCK,
        num_warps=8,
    )
