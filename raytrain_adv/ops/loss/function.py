"""Cross-entropy as a sum over label tokens; the training loop divides by their global count."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raytrain_adv.ops.loss import IGNORE
from raytrain_adv.ops.loss.head import loss_in_head, takes_labels

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


def router_loss(model: Any, output: Any, labels: Tensor) -> Tensor | float:
    """Return the routers' auxiliary loss for each label token if the config asks for it, as the
    model's own loss has it: of mixtures with `output_router_logits`.
    """
    found: Tensor | None = getattr(output, "aux_loss", None)
    if found is None:
        return 0.0
    weight = float(model.config.get_text_config().router_aux_loss_coef)
    return weight * found.float() * (labels != IGNORE).sum()
