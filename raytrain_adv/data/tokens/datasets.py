"""All rows of the job's datasets, read and tokenized into a cache entry."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.batches.order import random_order
from raytrain_adv.data.batches.statistics import NUM_EXAMPLES
from raytrain_adv.data.read.entries import Entry
from raytrain_adv.data.read.formats import layout
from raytrain_adv.data.read.sources import Row, Source, open_source
from raytrain_adv.data.tokens import cache
from raytrain_adv.data.tokens.processes import Task, tokenize_here, tokenize_in_processes
from raytrain_adv.data.tokens.progress import RowProgress, Say
from raytrain_adv.data.tokens.tokenize import Chunk, Recipe, Tokenizer, reasons
from raytrain_adv.data.tokens.tokenizer import tokenizer_fingerprint
from raytrain_adv.errors import JobError

Element = TypeVar("Element")

CHUNK = 1000
"""Rows that are tokenized at a time."""
ENOUGH_FOR_PROCESSES = 20_000
"""Rows below which starting processes takes longer than they save."""
SAMPLE = 100
"""Rows that a layout is derived from."""


class TokenizedDatasets:
    """The datasets of one key of the job, as one run of tokens."""

    def __init__(
        self, job: JobConfig, tokenizer: PreTrainedTokenizerBase, entries: list[Entry], say: Say
    ) -> None:
        self.data, self.seed = job.data, job.train.seed
        self.tokenizer, self.entries, self.say = tokenizer, entries, say
        self.sources = [open_source(entry, job.model.cache_dir) for entry in entries]
        self.recipe = Recipe(
            template=self.data.template,
            default_system=self.data.default_system,
            cutoff_len=self.data.cutoff_len,
            train_on_prompt=self.data.train_on_prompt,
            mask_history=self.data.mask_history,
        )

    def key(self) -> str:
        """Hash everything that decides the tokens; file paths and process counts do not."""
        entries = [
            asdict(replace(entry, name="", target="", kind="files")) for entry in self.entries
        ]
        decisive = {
            "version": cache.VERSION,
            "contents": [source.fingerprint for source in self.sources],
            "entries": entries,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "recipe": asdict(self.recipe),
            "max_samples": self.data.max_samples,
            "seed": self.seed if any(entry.num_samples for entry in self.entries) else None,
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:32]

    def build(self, writer: cache.CacheWriter) -> dict[str, Any]:
        """Tokenize every row into `writer`; return the counts.

        Raises:
            JobError: if a dataset is broken, or no row can be used.
        """
        counts: dict[str, Any] = {"read": 0, "used": 0, "unusable": 0, "truncated": 0}
        unusable: list[tuple[str, str]] = []
        with RowProgress(", ".join(entry.name for entry in self.entries), self.say) as progress:
            for chunk, share in self._chunks():
                writer.append(chunk)
                counts["read"] += chunk.num_read
                counts["used"] += len(chunk.lengths)
                counts["truncated"] += chunk.num_cut
                unusable += chunk.unusable
                progress.update(counts["read"], share)
        counts["unusable"] = len(unusable)
        counts["unusable_reasons"] = reasons(unusable)
        counts["unusable_examples"] = [
            {"where": w, "reason": r} for w, r in unusable[:NUM_EXAMPLES]
        ]
        if not counts["used"]:
            raise self._nothing_left(counts)
        return counts

    def _chunks(self) -> Iterator[tuple[Chunk, float]]:
        tasks = self._tasks()
        num_processes = self.data.preprocessing_num_workers or min(16, _num_cores())
        first = list(islice(tasks, ENOUGH_FOR_PROCESSES // CHUNK)) if num_processes > 1 else []
        if len(first) == ENOUGH_FOR_PROCESSES // CHUNK:
            yield from tokenize_in_processes(
                _chain(first, tasks), self.tokenizer, self.recipe, num_processes
            )
        else:
            yield from tokenize_here(_chain(first, tasks), Tokenizer(self.tokenizer, self.recipe))

    def _tasks(self) -> Iterator[Task]:
        total = len(self.entries)
        for number, (entry, source) in enumerate(zip(self.entries, self.sources, strict=True)):
            rows = self._rows(entry, source)
            sample = list(islice(rows, SAMPLE))
            if not sample:
                raise JobError(
                    f"Dataset {entry.name} is empty", "no rows", "give a dataset with rows"
                )
            found = layout(entry, [row.values for row in sample])
            rows = _chain(sample, rows)
            while part := list(islice(rows, CHUNK)):
                yield (
                    [(r.where, r.values) for r in part],
                    found,
                    (number + part[-1].progress) / total,
                )

    def _rows(self, entry: Entry, source: Source) -> Iterator[Row]:
        rows = source.rows()
        if entry.num_samples is not None:
            rows = self._drawn(list(rows), entry.num_samples)
        return islice(rows, self.data.max_samples)

    def _drawn(self, rows: list[Row], wanted: int) -> Iterator[Row]:
        """Draw rows at random; every row once before any comes again."""
        rounds = -(-wanted // len(rows)) if rows else 0
        order = [
            i for turn in range(rounds) for i in random_order(len(rows), self.seed, turn).tolist()
        ]
        return (replace(rows[i], progress=n / wanted) for n, i in enumerate(order[:wanted], 1))

    def _nothing_left(self, counts: dict[str, Any]) -> JobError:
        examples = "\n".join(f"{e['where']}: {e['reason']}" for e in counts["unusable_examples"])
        names = ", ".join(entry.name for entry in self.entries)
        return JobError(
            f"No row of {names} can be trained on",
            f"{counts['unusable']} rows read, none usable\n{examples}",
            "correct the rows, or formatting and columns in dataset_info.json;\n"
            "where prompts are long, raise cutoff_len",
        )


def _num_cores() -> int:
    """Count the cores this process may use: in a container fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _chain(first: list[Element], rest: Iterator[Element]) -> Iterator[Element]:
    yield from first
    yield from rest
