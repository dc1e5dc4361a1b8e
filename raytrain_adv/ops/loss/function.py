"""Cross-entropy as a sum over label tokens; the training loop divides by their global count."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raytrain_adv.ops.loss import IGNORE
from raytrain_adv.ops.loss.head import loss_in_head, takes_labels

CHUNK_TOKENS = 2048
"""Tokens whose logits are held in float32 at once where the loss is not compiled."""

LossFunction = Callable[[nn.Module, Mapping[str, Tensor | int], Tensor], Tensor]


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the float32 sum over logits [tokens, vocabulary]; labels are next tokens or -100."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")


def chunked_cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Return cross_entropy_sum without a float32 copy of all logits; backward recomputes chunks."""
    if logits.shape[0] <= CHUNK_TOKENS:
        return cross_entropy_sum(logits, labels)
    total = logits.new_zeros((), dtype=torch.float32)
    for part, target in zip(logits.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True):  # type: ignore[no-untyped-call]
        total = total + checkpoint(cross_entropy_sum, part, target, use_reentrant=False)
    return total


def loss_function(model: nn.Module, compile_it: bool) -> LossFunction:
    """Return (model, inputs, labels [sequences, time]) -> summed loss, by the head if it can."""
    if takes_labels(model):
        return loss_in_head
    inner = torch.compile(cross_entropy_sum) if compile_it else chunked_cross_entropy_sum

    def loss_sum(model: nn.Module, inputs: Mapping[str, Tensor | int], labels: Tensor) -> Tensor:
        # No name holds the logits: backward frees them as soon as it is past them.
        return inner(model(**inputs, use_cache=False).logits.flatten(0, 1), labels.flatten())

    return loss_sum
