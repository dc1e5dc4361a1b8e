"""What the trained model answers, kept beside an exported one, so that engines can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

REFERENCE = "trained_logprobs.npz"
"""Token ids [tokens], and after each the ids and log-probabilities [tokens, MOST] that training
computes, with its rounding."""
MOST = 64

Reference = dict[str, Any]


@dataclass(frozen=True)
class Agreement:
    """How far an engine's log-probabilities are from training's."""

    num_tokens: int
    top1: float
    """Share of positions with the same most likely token."""
    difference: float
    """Mean absolute difference over the tokens that both list."""
    kl: float
    """Mean divergence in nats, over the tokens that both list."""


def write_reference(folder: Path, input_ids: torch.Tensor, logits: torch.Tensor) -> None:
    """Write the reference of one sequence: ids [1, tokens], logits [1, tokens, vocabulary]."""
    known = logits[0].float().log_softmax(-1)
    values, ids = known.topk(min(MOST, known.shape[-1]))
    tokens = input_ids[0].cpu().numpy()
    np.savez(folder / REFERENCE, tokens=tokens, ids=ids.numpy(), logprobs=values.numpy())


def read_reference(folder: Path) -> Reference:
    """Return the arrays tokens, ids and logprobs."""
    with np.load(folder / REFERENCE) as stored:
        return dict(stored)


def agreement(known: Reference, found: list[dict[int, float]]) -> Agreement:
    """Compare the reference with log-probabilities by token id, for each position but the first."""
    same, apart, divergences = 0, [], []
    for ids, values, answer in zip(known["ids"], known["logprobs"], found, strict=False):
        wanted = dict(zip(ids.tolist(), values.tolist(), strict=True))
        shared = sorted(wanted.keys() & answer.keys())
        same += max(wanted, key=wanted.__getitem__) == max(answer, key=answer.__getitem__)
        if not shared:
            divergences.append(float("inf"))
            continue
        p, q = np.array([[one[i] for i in shared] for one in (wanted, answer)])
        apart.append(float(np.abs(p - q).mean()))
        p, q = (x - np.log(np.exp(x).sum()) for x in (p, q))
        divergences.append(float((np.exp(p) * (p - q)).sum()))
    mean = float(np.mean(apart)) if apart else float("inf")
    return Agreement(len(divergences), same / len(divergences), mean, float(np.mean(divergences)))
