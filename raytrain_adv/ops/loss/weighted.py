"""Losses other than the plain cross-entropy, summed over label tokens: DFT, EAFT and ASFT, which
weigh tokens, and distillation.

Source of the first three: LLaMA-Factory's train/trainer_utils.py, whose numbers these are.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from raytrain_adv.ops.loss import IGNORE
from raytrain_adv.ops.loss.function import (
    ChunkLoss,
    LossFunction,
    cross_entropy_sum,
    in_chunks,
    router_loss,
)

TOP_TOKENS = 20
"""Likeliest tokens of which EAFT takes the entropy."""
LARGEST_ENTROPY = 3.0
"""About the entropy of TOP_TOKENS equally likely ones, log(20)."""


def dft_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of logits [tokens, vocabulary], each times its probability."""
    losses = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")
    return (losses * torch.exp(-losses.detach())).sum()


def eaft_sum(alpha: float) -> ChunkLoss:
    """Return the cross-entropy times the entropy of the likeliest tokens, to the power of alpha."""

    def weighted(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")
        with torch.no_grad():
            top = logits.float().topk(min(TOP_TOKENS, logits.shape[-1])).values.log_softmax(-1)
            entropy = -(top.exp() * top).sum(-1)
        return (losses * (entropy / LARGEST_ENTROPY) ** alpha).sum()

    return weighted


def asft_loss(reference: nn.Module, alpha: float) -> LossFunction:
    """Return DFT plus alpha times the divergence of the model from the reference's tokens."""

    def of_chunk(logits: torch.Tensor, known: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return dft_sum(logits, labels) + alpha * divergence_sum(logits, known, labels)

    return _beside(reference, of_chunk)


def distill_loss(teacher: nn.Module, alpha: float) -> LossFunction:
    """Return alpha times the divergence from the teacher's tokens, plus 1 - alpha times the labels'
    cross-entropy.
    """

    def of_chunk(logits: torch.Tensor, known: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        total = alpha * divergence_sum(logits, known, labels)
        return total if alpha == 1 else total + (1 - alpha) * cross_entropy_sum(logits, labels)

    return _beside(teacher, of_chunk)


def divergence_sum(logits: torch.Tensor, known: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return KL(known, logits) in nats over label tokens; both are [tokens, vocabulary]."""
    ours, theirs = logits.float().log_softmax(-1), known.float().log_softmax(-1)
    divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    return (divergence * (labels != IGNORE)).sum()


def _beside(reference: nn.Module, of_chunk: ChunkLoss) -> LossFunction:
    """Return the loss of chunks of the model's logits, the reference's and labels."""

    def loss_sum(
        model: nn.Module, inputs: Mapping[str, torch.Tensor | int], labels: torch.Tensor
    ) -> torch.Tensor:
        with torch.no_grad():
            known = reference(**inputs, use_cache=False).logits.flatten(0, 1)
        output = model(**inputs, use_cache=False)
        total = in_chunks(of_chunk, output.logits.flatten(0, 1), known, labels.flatten())
        return total + router_loss(model, output, labels)

    return loss_sum
