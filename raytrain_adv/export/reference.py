"""What the trained model answers, kept beside an exported one, so that engines can be compared."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.model.packing import first_position
from raytrain_adv.model.vocabulary import read_tokenizer

TEXT = """Rivers begin as rain. Water that falls on a mountain runs down its sides in thin streams,
and where two meet they form a larger one. A river carries stones, then gravel, then sand, and
when it reaches flat land it slows down and leaves them behind. This is why the ground near a river
is good for farming, and why so many old cities stand beside one.

Question: A train leaves at 9:40 and takes 85 minutes. When does it arrive?
Answer: 85 minutes are one hour and 25 minutes. Adding one hour to 9:40 gives 10:40, and 25
minutes more give 11:05, so the train arrives at 11:05.

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

Translate into French: "Good morning, where is the station?"
"Bonjour, où est la gare ?"

She closed the book, put it back on the shelf, and went to the window. It was still raining. On the
other side of the street a man with a red umbrella was waiting for somebody who did not come."""
"""What a model without a dataset is compared on: prose, a calculation, code, another language."""
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


def sample_tokens(model: PreTrainedModel, job: JobConfig, most: int) -> torch.Tensor:
    """Return at most `most` token ids of TEXT; random ones [most] if the model has no tokenizer."""
    config: Any = model.config.get_text_config()
    most = min(most, getattr(config, "max_position_embeddings", most) - first_position(model))
    if any(Path(job.model.model_name_or_path).glob("tokenizer*")):
        ids = torch.tensor(read_tokenizer(job)(TEXT).input_ids)
        if len(ids := ids[ids < int(config.vocab_size)]):
            return ids[:most]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(int(config.vocab_size), (most,), generator=generator)


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
