"""What finished models are measured by: held-out loss, and scores of answers, row by row, so that
two models are compared on the same rows.
"""

import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.batches.collate import collate, pad_to
from raytrain_adv.data.batches.sequences import SequenceSet
from raytrain_adv.driver.commands.use.load import Loaded
from raytrain_adv.errors import JobError
from raytrain_adv.ops.loss import IGNORE

LOGITS_BYTES = 2**30
"""Most bytes of logits that are computed at once, unless a single sequence has more."""
Score = Callable[[str, str], float]
Rows = NDArray[np.float64]


@dataclass(frozen=True)
class Figure:
    """A mean over rows, with its standard error, and the difference from the first model's, taken
    row by row; nulls for the first model, and where a single row has no spread.
    """

    value: float
    error: float | None
    num_rows: int
    difference: float | None = None
    difference_error: float | None = None


def mean(sums: Rows, weights: Rows, first: Rows | None = None) -> Figure:
    """Return the mean of rows: `sums` [rows] by their `weights` [rows], the label tokens of each or
    ones. `first` has the first model's sums of the same rows.

    The error is that of a ratio of sums over rows drawn independently (linearized).
    """
    total, count = float(weights.sum()), len(sums)
    value = float(sums.sum()) / total

    def error(values: Rows, center: float) -> float | None:
        if count < 2:
            return None
        apart = values - center * weights
        return math.sqrt(float((apart**2).sum()) * count / (count - 1)) / total

    figure = Figure(value, error(sums, value), count)
    if first is None:
        return figure
    between = sums - first
    difference = float(between.sum()) / total
    return Figure(value, figure.error, count, difference, error(between, difference))


def alone(held_out: SequenceSet, job: JobConfig) -> SequenceSet:
    """Return held-out sequences; of neat_packing each conversation alone: that is the same."""
    if not job.data.neat_packing:
        return held_out
    return SequenceSet(
        held_out.rows, [m[i : i + 1] for m in held_out.members for i in range(len(m))]
    )


@torch.no_grad()
def losses(loaded: Loaded, job: JobConfig, held_out: SequenceSet) -> tuple[Rows, Rows]:
    """Return the summed cross-entropy of each sequence, and its label tokens: [rows] both."""
    vocabulary = loaded.model.get_output_embeddings().weight.shape[0]
    size = loaded.model.dtype.itemsize
    sums, tokens, at = [], [], 0
    pad = int(loaded.tokenizer.pad_token_id or 0)
    while at < len(held_out):
        most = job.train.per_device_eval_batch_size
        longest = int(held_out.lengths[at : at + most].max())
        fit = LOGITS_BYTES // (pad_to(job).length(longest) * vocabulary * size)
        rows = [held_out[i] for i in range(at, min(at + max(1, min(most, fit)), len(held_out)))]
        tensors = collate(rows, pad_token_id=pad, pad_to=pad_to(job), neat=False)
        labels = tensors["labels"].to(loaded.device)
        logits = loaded.model(
            input_ids=tensors["input_ids"].to(loaded.device), use_cache=False
        ).logits
        for row, wanted in zip(logits, labels, strict=True):
            loss = functional.cross_entropy(
                row.float(), wanted, ignore_index=IGNORE, reduction="sum"
            )
            sums.append(float(loss))
            tokens.append(float((wanted != IGNORE).sum()))
        at += len(rows)
    return np.array(sums), np.array(tokens)


def same_tokens(loaded: Loaded, first: Loaded) -> None:
    """Refuse to compare losses per token of models with different tokens. Raises JobError."""
    if loaded.tokenizer.get_vocab() != first.tokenizer.get_vocab():
        raise JobError(
            f"{loaded.source.folder} has other tokens than {first.source.folder}",
            f"{len(loaded.tokenizer):,} and {len(first.tokenizer):,} of them",
            "losses per token cannot be compared; leave it out, or give --answers alone",
        )


def exact_match(answer: str, reference: str) -> float:
    """Return 1 if the answer is the reference, except for white space at its ends, else 0."""
    return float(answer.strip() == reference.strip())


def score_named(name: str) -> Score:
    """Return the function that `module:function` names, from here or what is installed. Raises
    JobError if there is none.
    """
    module, colon, function = name.partition(":")
    fix = "write --score module:function, of def function(answer, reference) -> number"
    if not colon:
        raise JobError(f"--score {name} names no function", "there is no colon in it", fix)
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # the user's module raises what it likes
        raise JobError(
            f"--score {name} cannot be used", f"{type(error).__name__}: {error}", fix
        ) from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not callable(found):
        raise JobError(f"--score {name} is not a function", type(found).__name__, fix)
    return scored(found, name)


def scored(function: Callable[..., Any], name: str) -> Score:
    """Return the function with its failures explained."""

    def score(answer: str, reference: str) -> float:
        try:
            value = float(function(answer, reference))
        except Exception as error:  # the user's function raises what it likes
            found = f"{type(error).__name__}: {error}\n{answer!r:.80} for {reference!r:.80}"
            raise JobError(f"--score {name} failed", found, "correct it") from error
        if not math.isfinite(value):
            raise JobError(
                f"--score {name} gave {value}", f"answer {answer!r:.80}", "return a number"
            )
        return value

    return score
