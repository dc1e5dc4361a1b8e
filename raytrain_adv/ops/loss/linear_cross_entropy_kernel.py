"""Triton kernels of linear_cross_entropy: a row's loss, its gradient over its logits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 16384  # columns a program holds at a time


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def _logits(x, scale, softcap, HAS_SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    x = x.to(tl.float32) * scale
    if HAS_SOFTCAP:
        x = (2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0) * softcap  # tanh
    return x


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def _softmax_gradient(  # type: ignore[no-untyped-def] # its arguments are not Python values
    x,
    labels,
    losses,
    vocab,
    scale,
    softcap,
    IGNORED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WRITE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row * vocab
    label = tl.load(labels + row)
    if label == IGNORED:
        tl.store(losses + row, 0.0)
        if WRITE:
            for start in range(0, vocab, BLOCK):
                column = start + tl.arange(0, BLOCK)
                tl.store(x + column, tl.zeros((BLOCK,), x.dtype.element_ty), mask=column < vocab)
        return
    largest = float("-inf")
    total = 0.0
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocab
        value = _logits(tl.load(x + column, mask=inside, other=0.0), scale, softcap, HAS_SOFTCAP)
        value = tl.where(inside, value, float("-inf"))
        new = tl.maximum(largest, tl.max(value))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(value - new))
        largest = new
    log_sum = largest + tl.log(total)
    own = _logits(tl.load(x + label), scale, softcap, HAS_SOFTCAP)
    tl.store(losses + row, log_sum - own)
    if WRITE:
        # Every thread has read the label's logit before one writes there.
        tl.debug_barrier()
        for start in range(0, vocab, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < vocab
            value = _logits(
                tl.load(x + column, mask=inside, other=0.0), scale, softcap, HAS_SOFTCAP
            )
            gradient = tl.exp(value - log_sum) - tl.where(column == label, 1.0, 0.0)
            if HAS_SOFTCAP:
                bent = value / softcap
                gradient *= 1.0 - bent * bent
            tl.store(x + column, (gradient * scale).to(x.dtype.element_ty), mask=inside)


def launch(
    x: Tensor, labels: Tensor, scale: float, softcap: float | None, write: bool, ignored: int
) -> Tensor:
    """Return each row's loss, float32 [rows]; with `write`, overwrite x by the gradient."""
    rows, vocab = x.shape
    if not x.is_contiguous():
        raise ValueError("the logits of a chunk must be contiguous")
    losses = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows == 0:
        return losses
    _softmax_gradient[(rows,)](
        x,
        labels.contiguous(),
        losses,
        vocab,
        scale,
        1.0 if softcap is None else softcap,
        IGNORED=ignored,
        HAS_SOFTCAP=softcap is not None,
        WRITE=write,
        BLOCK=min(BLOCK, triton.next_power_of_2(vocab)),
        num_warps=16,
    )
    return losses


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def _scale(x, factor, numel, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    by = tl.load(factor)
    if by != 1.0:
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = index < numel
        value = tl.load(x + index, mask=inside).to(tl.float32) * by
        tl.store(x + index, value.to(x.dtype.element_ty), mask=inside)


def launch_scale(x: Tensor, factor: Tensor) -> None:
    """Multiply x, contiguous, in place by a float32 scalar on its device, in float32."""
    block = 4096
    if x.numel():
        grid = (triton.cdiv(x.numel(), block),)
        _scale[grid](x, factor.float(), x.numel(), BLOCK=block, num_warps=8)
