"""From the job's data keys to sequences: resolve, read, tokenize or open the cache, split, pack."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from raytrain_adv.config.job import JobConfig
from raytrain_adv.config.sections import DataConfig
from raytrain_adv.data.batches.order import num_held_out, random_order
from raytrain_adv.data.batches.packing import pack
from raytrain_adv.data.batches.sequences import SequenceSet, TokenRows
from raytrain_adv.data.batches.statistics import describe, sentences
from raytrain_adv.data.read.entries import resolve
from raytrain_adv.data.tokens import cache
from raytrain_adv.data.tokens.datasets import TokenizedDatasets
from raytrain_adv.data.tokens.progress import Say
from raytrain_adv.data.tokens.tokenizer import load_tokenizer
from raytrain_adv.errors import JobError

_SPLIT = 0x73706C6974
"""Sets the held-out rows' random numbers apart from those of the epochs."""


class Prompt(NamedTuple):
    """A question to the trained model, and the answer the dataset gives."""

    input_ids: list[int]
    """The conversation up to where its last answer begins."""
    text: str
    reference: str


@dataclass(frozen=True)
class PreparedData:
    """The job's data, ready to train on."""

    train: SequenceSet
    eval: SequenceSet | None
    stats: dict[str, Any]
    """JSON: see statistics.py."""

    def prompts(self, n: int, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
        """Return `n` prompts spread over the held-out rows; over the training rows if none are
        held out."""
        source = self.eval or self.train
        rows = np.concatenate(source.members)
        picked = (
            rows[np.unique(np.linspace(0, len(rows) - 1, min(n, len(rows))).astype(int))]
            if n
            else rows[:0]
        )
        return [_prompt(source.rows, int(row), tokenizer) for row in picked]


def _prompt(rows: TokenRows, row: int, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    ids = rows.tokens(row).tolist()
    start = int(rows.answer_starts[row])
    parts = [str(tokenizer.decode(p, skip_special_tokens=True)) for p in (ids[:start], ids[start:])]
    return Prompt(ids[:start], parts[0].strip(), parts[1].strip())


def prepare(job: JobConfig, say: Say, *, rebuild: bool | None = None) -> PreparedData:
    """Tokenize the job's datasets, or open them where they are tokenized already, and lay them out
    in sequences.

    May be called by any number of processes at once: of those that share a file system one
    tokenizes, the others wait and open the result. They need no connection to each other.

    Args:
        job: the job.
        say: prints a sentence.
        rebuild: tokenize even if it was done before; None means the job's overwrite_cache. Workers
            whose driver has prepared the data pass False.

    Raises:
        JobError: if a dataset cannot be found, read or understood, or no row of it can be used.
        StorageError: if the tokenized data cannot be written.
    """
    data = job.data
    _check_keys(data)
    tokenizer = load_tokenizer(job)
    again = data.overwrite_cache if rebuild is None else rebuild
    train_part = _tokenized(job, tokenizer, data.dataset, "dataset", again, say)
    eval_part = None
    if data.eval_dataset is not None:
        eval_part = _tokenized(job, tokenizer, data.eval_dataset, "eval_dataset", again, say)
    train_rows, eval_rows = _split(len(train_part.rows), data.val_size, job.train.seed)
    train = _sequences(train_part.rows, train_rows, data)
    held_out = None
    if eval_part is not None:
        held_out = _sequences(eval_part.rows, np.arange(len(eval_part.rows)), data)
    elif len(eval_rows):
        held_out = _sequences(train_part.rows, eval_rows, data)
    stats = _stats(data, train, held_out, train_part, eval_part)
    for sentence in sentences(stats):
        say(sentence)
    return PreparedData(train, held_out, stats)


def _check_keys(data: DataConfig) -> None:
    """Refuse keys that contradict each other, for callers that did not load the job from a file."""
    for first, second, both in (
        ("val_size", "eval_dataset", data.val_size > 0 and data.eval_dataset is not None),
        ("train_on_prompt", "mask_history", data.train_on_prompt and data.mask_history),
    ):
        if both:
            raise JobError(
                f"{first} and {second} exclude each other",
                "both are set",
                f"remove {first} or {second}",
            )
    if data.val_size >= 1 and data.val_size != int(data.val_size):
        raise JobError(
            "val_size must be a number of rows, or a share below 1",
            f"{data.val_size}",
            "use a whole number",
        )


def _tokenized(
    job: JobConfig,
    tokenizer: PreTrainedTokenizerBase,
    names: str | list[str] | None,
    key: str,
    again: bool,
    say: Say,
) -> cache.CacheEntry:
    entries = resolve(names, job.data, key)
    datasets = TokenizedDatasets(job, tokenizer, entries, say)
    return cache.open_or_build(
        cache.cache_root(job.data.tokenized_path), datasets.key(), datasets.build, again, say
    )


def _split(n: int, val_size: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows to train on and the rows held out, each in file order."""
    num_held = num_held_out(n, val_size, "usable rows")
    order = random_order(n, seed, _SPLIT)
    return np.sort(order[num_held:]), np.sort(order[:num_held])


def _sequences(rows: TokenRows, chosen: NDArray[np.int64], data: DataConfig) -> SequenceSet:
    if not (data.packing or data.neat_packing):
        return SequenceSet(rows, [chosen[i : i + 1] for i in range(len(chosen))])
    return SequenceSet(
        rows, [chosen[group] for group in pack(rows.lengths[chosen], data.cutoff_len)]
    )


def _stats(
    data: DataConfig,
    train: SequenceSet,
    held_out: SequenceSet | None,
    train_part: cache.CacheEntry,
    eval_part: cache.CacheEntry | None,
) -> dict[str, Any]:
    packed = data.packing or data.neat_packing
    return {
        "rows": train_part.stats,
        "eval_rows": eval_part.stats if eval_part else None,
        "train": describe(train, data.cutoff_len, packed),
        "eval": describe(held_out, data.cutoff_len, packed) if held_out else None,
        "cutoff_len": data.cutoff_len,
        "cache_path": str(train_part.path),
        "eval_cache_path": str(eval_part.path) if eval_part else None,
    }
