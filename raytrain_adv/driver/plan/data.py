"""Sizes of the data for a plan: counted if that takes seconds, else estimated from a sample."""

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.prepare import PreparedData, prepare
from raytrain_adv.data.read.entries import Entry, resolve
from raytrain_adv.data.read.sources import open_source
from raytrain_adv.data.tokens import cache
from raytrain_adv.data.tokens.datasets import TokenizedDatasets
from raytrain_adv.data.tokens.tokenizer import load_tokenizer
from raytrain_adv.text import split_names

Say = Callable[[str], None]

COUNTED = 20_000  # datasets of at most these rows are tokenized for a plan, into the run's cache
SAMPLE = 2_000  # first rows of a larger dataset, from which its size is estimated


@dataclass(frozen=True)
class DataSummary:
    """Sizes of the job's data."""

    num_rows: int  # conversations to train on
    num_sequences: int
    num_tokens: int  # tokens in the sequences, without padding
    longest: int  # tokens of the longest training sequence
    num_held_out: int  # sequences for evaluation
    packing_efficiency: float | None  # filled share of the packed sequences; None without packing
    estimated_from: int = 0  # rows of the sample behind the estimate; 0 if the sizes were counted


def summarize(prepared: PreparedData) -> DataSummary:
    """Return the sizes of prepared data."""
    train, held_out = prepared.train, prepared.eval
    numbers = prepared.stats["train"]
    return DataSummary(
        num_rows=numbers["rows"],
        num_sequences=len(train),
        num_tokens=numbers["tokens"],
        longest=int(train.lengths.max()),
        num_held_out=len(held_out) if held_out is not None else 0,
        packing_efficiency=numbers.get("packing_efficiency"),
    )


def measure(job: JobConfig, say: Say) -> DataSummary:
    """Return the sizes of the data, estimated if it is large and not tokenized. Raises JobError."""
    entries = resolve(job.data.dataset, job.data, "dataset", job.source)
    num_rows = [_estimated_rows(entry, job) for entry in entries]
    if sum(num_rows) <= COUNTED or _is_cached(job, entries):
        return summarize(prepare(job, say))
    say(f"about {sum(num_rows):,} rows: estimated from the first {SAMPLE:,} of each dataset")
    with tempfile.TemporaryDirectory() as folder:
        samples = [_sample(job, name, folder, say) for name in split_names(job.data.dataset)]
    return _split(job, _join(samples, num_rows))


def _estimated_rows(entry: Entry, job: JobConfig) -> int:
    if entry.num_samples is not None:
        rows = entry.num_samples
    else:
        first = list(islice(open_source(entry, job.model.cache_dir).rows(), SAMPLE))
        reached = first[-1].progress if first else 1.0
        rows = len(first) if len(first) < SAMPLE else round(len(first) / max(reached, 1e-9))
    return min(rows, job.data.max_samples or rows)


def _is_cached(job: JobConfig, entries: list[Entry]) -> bool:
    datasets = TokenizedDatasets(job, load_tokenizer(job), entries, lambda sentence: None)
    folder = cache.cache_root(job.data.tokenized_path) / datasets.key()
    return folder.is_dir() and not job.data.overwrite_cache


def _sample(job: JobConfig, name: str, folder: str, say: Say) -> DataSummary:
    keys = {
        "dataset": [name],
        "eval_dataset": None,
        "val_size": 0.0,
        "max_samples": min(SAMPLE, job.data.max_samples or SAMPLE),
        "tokenized_path": folder,
        "preprocessing_num_workers": 1,
    }
    small = dataclasses.replace(job, data=job.data.model_copy(update=keys))
    prepared = prepare(small, lambda sentence: None)
    for sentence in prepared.stats["rows"].get("guessed", ()):
        say(sentence)
    return summarize(prepared)


def _times(data: DataSummary, factor: float) -> DataSummary:
    return dataclasses.replace(
        data,
        num_rows=round(data.num_rows * factor),
        num_sequences=max(round(data.num_sequences * factor), 1),
        num_tokens=round(data.num_tokens * factor),
    )


def _join(samples: list[DataSummary], num_rows: list[int]) -> DataSummary:
    parts = [_times(s, rows / s.num_rows) for s, rows in zip(samples, num_rows, strict=True)]
    filled = [p.packing_efficiency for p in parts if p.packing_efficiency is not None]
    return DataSummary(
        num_rows=sum(num_rows),
        num_sequences=sum(p.num_sequences for p in parts),
        num_tokens=sum(p.num_tokens for p in parts),
        longest=max(p.longest for p in parts),
        num_held_out=0,
        packing_efficiency=sum(filled) / len(filled) if filled else None,
        estimated_from=sum(s.num_rows for s in samples),
    )


def _split(job: JobConfig, whole: DataSummary) -> DataSummary:
    size = job.data.val_size
    held = (int(size) if size >= 1 else round(whole.num_rows * size)) / whole.num_rows
    num_held_out = round(whole.num_sequences * held)
    return dataclasses.replace(_times(whole, 1 - held), num_held_out=num_held_out)
