"""Losses as sums over label tokens; the training loop divides by their global count: the
cross-entropy, DFT, EAFT and ASFT, which weigh tokens, and distillation.

Source of DFT, EAFT and ASFT: LLaMA-Factory's train/trainer_utils.py, whose numbers these are.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raytrain_adv.ops.loss import IGNORE
from raytrain_adv.ops.loss.head import loss_in_head, takes_labels
from raytrain_adv.ops.loss.routers import TOKENS, router_loss

CHUNK_TOKENS = 2048
"""Tokens whose logits are held in float32 at once where the loss is not compiled."""

ChunkLoss = Callable[..., Tensor]
"""(logits [tokens, vocabulary], labels [tokens]) -> summed loss."""
LossFunction = Callable[[nn.Module, Mapping[str, Tensor | int], Tensor], Tensor]


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the float32 sum over logits [tokens, vocabulary]; labels are next tokens or -100."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")


def in_chunks(loss: ChunkLoss, *of_tokens: Tensor) -> Tensor:
    """Return a loss without a float32 copy of all logits; backward recomputes chunks.

    `of_tokens` are what the loss takes, each [tokens, ...].
    """
    if of_tokens[0].shape[0] <= CHUNK_TOKENS:
        return loss(*of_tokens)
    total = of_tokens[0].new_zeros((), dtype=torch.float32)
    splits: list[Any] = [one.split(CHUNK_TOKENS) for one in of_tokens]  # type: ignore[no-untyped-call]
    for parts in zip(*splits, strict=True):
        total = total + checkpoint(loss, *parts, use_reentrant=False)
    return total


def chunked_cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Return cross_entropy_sum without a float32 copy of all logits."""
    return in_chunks(cross_entropy_sum, logits, labels)


def loss_function(
    model: nn.Module, compile_it: bool, weighted: ChunkLoss | None = None
) -> LossFunction:
    """Return (model, inputs, labels [sequences, time]) -> summed loss, by the head if it can, and
    with `weighted` by that of chunks of logits.
    """
    if weighted is None and takes_labels(model):
        return loss_in_head
    plain = weighted or cross_entropy_sum
    inner = torch.compile(plain) if compile_it else partial(in_chunks, plain)

    def loss_sum(model: nn.Module, inputs: Mapping[str, Tensor | int], labels: Tensor) -> Tensor:
        output = model(**inputs, use_cache=False)
        total = inner(output.logits.flatten(0, 1), labels.flatten())
        return total + router_loss(model, output, labels)

    return loss_sum


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
        plain = {name: value for name, value in inputs.items() if name != TOKENS}
        with torch.no_grad():
            known = reference(**plain, use_cache=False).logits.flatten(0, 1)
        output = model(**inputs, use_cache=False)
        total = in_chunks(of_chunk, output.logits.flatten(0, 1), known, labels.flatten())
        return total + router_loss(model, output, labels)

    return loss_sum
