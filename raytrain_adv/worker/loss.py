"""Cross-entropy as a sum over label tokens; who divides by their global count is the training
loop.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORED = -100
CHUNK_TOKENS = 2048
"""Tokens whose logits are held in float32 at once where the loss is not compiled."""

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the summed cross-entropy in float32.

    Args:
        logits: [tokens, vocabulary], any float dtype.
        labels: [tokens], the token that follows, or -100.
    """
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")


def chunked_cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return cross_entropy_sum without a float32 copy of all logits: chunks are computed again in
    backward.

    Args:
        logits: [tokens, vocabulary], any float dtype.
        labels: [tokens], the token that follows, or -100.
    """
    if logits.shape[0] <= CHUNK_TOKENS:
        return cross_entropy_sum(logits, labels)
    total = logits.new_zeros((), dtype=torch.float32)
    for part, target in zip(logits.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True):  # type: ignore[no-untyped-call]
        total = total + checkpoint(cross_entropy_sum, part, target, use_reentrant=False)
    return total


def loss_function(compile_it: bool) -> LossFunction:
    """Return the loss for logits [batch, time, vocabulary] and labels [batch, time]."""
    inner = torch.compile(cross_entropy_sum) if compile_it else chunked_cross_entropy_sum

    def loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return inner(logits.flatten(0, 1), labels.flatten())

    return loss_sum
