"""What the trained model answers, kept beside an exported one, so that engines can be compared."""

import hashlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.errors import JobError
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
computes, with its rounding; and the sha256 of each file of the model."""
MOST = 64
FILES = ("config.json", "adapter_config.json", "*.safetensors", "*.gguf")

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
    """Mean divergence in nats, over the tokens that either lists; of one that the other does not
    list, the other has its least likely listed one's."""


def write_reference(folder: Path, input_ids: torch.Tensor, logits: torch.Tensor) -> None:
    """Write the reference of one sequence: ids [1, tokens], logits [1, tokens, vocabulary]."""
    known = logits[0].float().log_softmax(-1)
    values, ids = known.topk(min(MOST, known.shape[-1]))
    tokens = input_ids[0].cpu().numpy()
    files = [(file.name, _digest(file)) for kind in FILES for file in sorted(folder.glob(kind))]
    known_ids, known_values = ids.numpy(), values.numpy()
    to = folder / REFERENCE
    np.savez(to, tokens=tokens, ids=known_ids, logprobs=known_values, files=np.array(files))


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def changed_files(folder: Path, known: Reference) -> Iterator[str]:
    """Yield the files that are gone or not as they were when the reference was written."""
    for name, digest in known.get("files", ()):
        if not (folder / name).is_file():
            yield f"{name} is gone"
        elif _digest(folder / name) != digest:
            yield f"{name} has changed"


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
    """Return the arrays tokens, ids, logprobs and files. Raises JobError when it is damaged."""
    try:
        with np.load(folder / REFERENCE) as stored:
            return dict(stored)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise JobError(f"{folder / REFERENCE} is damaged", str(error), "copy it again") from error


def agreement(known: Reference, found: list[dict[int, float]]) -> Agreement:
    """Compare the reference with log-probabilities by token id, for each position but the first."""
    same, apart, divergences = 0, [], []
    for ids, values, answer in zip(known["ids"], known["logprobs"], found, strict=False):
        wanted = dict(zip(ids.tolist(), values.tolist(), strict=True))
        same += max(wanted, key=wanted.__getitem__) == max(answer, key=answer.__getitem__)
        apart += [abs(wanted[i] - answer[i]) for i in wanted.keys() & answer.keys()]
        # An engine may list more, as the next token of the prompt whatever its place.
        least = [sorted(one.values())[-len(ids) :][0] for one in (wanted, answer)]
        either = sorted(wanted.keys() | answer.keys())
        p, q = np.array(
            [
                [one.get(i, low) for i in either]
                for one, low in zip((wanted, answer), least, strict=True)
            ]
        )
        p, q = (x - np.log(np.exp(x).sum()) for x in (p, q))
        divergences.append(float((np.exp(p) * (p - q)).sum()))
    if not divergences:
        return Agreement(0, 0.0, float("inf"), float("inf"))
    mean = float(np.mean(apart)) if apart else float("inf")
    return Agreement(len(divergences), same / len(divergences), mean, float(np.mean(divergences)))
