"""All rows of the job's datasets, read and tokenized into a cache entry."""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import chain, islice
from typing import Any, TypeVar

import numpy as np
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.batches.order import random_order
from raytrain_adv.data.read.entries import Entry
from raytrain_adv.data.read.formats import Layout, layout, text_layout
from raytrain_adv.data.read.sources import Row, Source, open_source
from raytrain_adv.data.tokens import cache
from raytrain_adv.data.tokens.cache import Say
from raytrain_adv.data.tokens.processes import Task, tokenize_here, tokenize_in_processes
from raytrain_adv.data.tokens.templates import find_template
from raytrain_adv.data.tokens.tokenize import Chunk, Recipe, Tokenizer, reasons
from raytrain_adv.data.tokens.tokenizer import tokenizer_fingerprint
from raytrain_adv.errors import JobError
from raytrain_adv.probe_script import num_cores
from raytrain_adv.text import plural

CHUNK = 1000
"""Rows that are tokenized at a time."""
ENOUGH_FOR_PROCESSES = 20_000
"""Rows below which starting processes takes longer than they save."""
NUM_SHOWN = 5
"""Of those, the ones in a message."""
SAMPLE = 100
"""Rows that a layout is derived from."""
NUM_EXAMPLES = 100
"""Unusable rows, and cut ones, that are named; the others are counted."""
SECONDS_BETWEEN_LINES = 5.0


class TokenizedDatasets:
    """The datasets of one key of the job, as one run of tokens."""

    def __init__(
        self, job: JobConfig, tokenizer: PreTrainedTokenizerBase, entries: list[Entry], say: Say
    ) -> None:
        self.data, self.seed = job.data, job.train.seed
        self.tokenizer, self.entries, self.say = tokenizer, entries, say
        self.sources = [open_source(entry, job.model.cache_dir) for entry in entries]
        data = self.data
        self.recipe = Recipe(
            data.template,
            data.default_system,
            data.cutoff_len,
            data.train_on_prompt,
            data.mask_history,
            data.enable_thinking,
            job.train.stage == "pt",
            data.split_special_tokens,
        )
        self.guessed: dict[str, str] = {}
        """Dataset -> which columns are read, where its entry does not say so, and of stage pt."""

    def _template_source(self) -> str:
        """Return the source of the template that the job names: a later version may differ."""
        recipe = self.recipe
        if recipe.template is None:
            return ""
        return find_template(recipe.template).write(recipe.enable_thinking, recipe.mask_history)

    def key(self) -> str:
        """Hash everything that decides the tokens; file paths and process counts do not."""
        entries = [asdict(replace(one, name="", target="", kind="files")) for one in self.entries]
        decisive = {
            "version": f"{cache.VERSION}, joined" if self.recipe.pretrains else cache.VERSION,
            "contents": [source.fingerprint for source in self.sources],
            "entries": entries,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "recipe": asdict(self.recipe),
            "template": self._template_source(),
            "max_samples": self.data.max_samples,
            "mix": self._mix(),
            "seed": self.seed
            if self._mix() or any(entry.num_samples for entry in self.entries)
            else None,
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:32]

    def build(self, writer: cache.CacheWriter) -> dict[str, Any]:
        """Tokenize every row into `writer`; return the counts. Raises JobError if a dataset is
        broken, or no row can be used.
        """
        counts: dict[str, Any] = {"read": 0, "used": 0, "with_control_tokens": 0}
        unusable: list[tuple[str, str]] = []
        cut: list[tuple[str, int]] = []
        names = ", ".join(entry.name for entry in self.entries)
        with RowProgress(names, self.say) as progress:
            for chunk, share in self._chunks():
                writer.append(chunk)
                counts["read"] += chunk.num_read
                counts["used"] += len(chunk.lengths)
                cut += chunk.cut
                counts["with_control_tokens"] += chunk.num_control
                unusable += chunk.unusable
                progress.update(counts["read"], share)
        counts["guessed"] = list(self.guessed.values())
        counts["unusable"] = len(unusable)
        counts["unusable_reasons"] = reasons(unusable)
        first = unusable[:NUM_EXAMPLES]
        counts["truncated"] = len(cut)
        counts["cut_examples"] = [{"where": w, "tokens": n} for w, n in cut[:NUM_EXAMPLES]]
        counts["unusable_examples"] = [{"where": w, "reason": r} for w, r in first]
        if not counts["used"]:
            examples = "\n".join(f"{where}: {reason}" for where, reason in first[:NUM_SHOWN])
            raise JobError(
                f"No row of {names} can be trained on",
                f"{counts['unusable']} rows read, none usable\n{examples}",
                "correct the rows, or formatting and columns in dataset_info.json;\n"
                "where prompts are long, raise cutoff_len",
            )
        return counts

    def _chunks(self) -> Iterator[tuple[Chunk, float]]:
        tasks = self.tasks()
        num_processes = self.data.preprocessing_num_workers or min(16, num_cores())
        first = list(islice(tasks, ENOUGH_FOR_PROCESSES // CHUNK)) if num_processes > 1 else []
        if len(first) == ENOUGH_FOR_PROCESSES // CHUNK:
            tasks = chain(first, tasks)
            yield from tokenize_in_processes(tasks, self.tokenizer, self.recipe, num_processes)
        else:
            yield from tokenize_here(chain(first, tasks), Tokenizer(self.tokenizer, self.recipe))

    def _mix(self) -> list[Any] | None:
        """Return how datasets are interleaved; none if they follow each other."""
        if self.data.mix_strategy == "concat" or len(self.entries) == 1:
            return None
        return [self.data.mix_strategy, self.data.shares]

    def _interleaved(self) -> Iterator[Task]:
        pairs = list(zip(self.entries, self.sources, strict=True))
        samples = [list(islice(self._rows(*pair), SAMPLE)) for pair in pairs]
        found = [
            self.layout(entry, source, [row.values for row in sample])
            for (entry, source), sample in zip(pairs, samples, strict=True)
        ]
        streams = [partial(self._rows, *pair) for pair in pairs]
        mixed = interleave(streams, self.data.mix_strategy, self.data.shares, self.seed)
        waiting: list[list[Row]] = [[] for _ in pairs]
        for number, row in mixed:
            waiting[number].append(row)
            if len(waiting[number]) == CHUNK:
                part, waiting[number] = waiting[number], []
                yield [(r.where, r.values) for r in part], found[number], row.progress
        for number, part in enumerate(waiting):
            if part:
                yield [(r.where, r.values) for r in part], found[number], 1.0

    def tasks(self) -> Iterator[Task]:
        """Yield the rows, chunk by chunk, each with its layout. Raises JobError if a dataset is
        empty, broken, or of no known layout.
        """
        if self._mix():
            yield from self._interleaved()
            return
        total = len(self.entries)
        for number, (entry, source) in enumerate(zip(self.entries, self.sources, strict=True)):
            rows = self._rows(entry, source)
            sample = list(islice(rows, SAMPLE))
            if not sample:
                fix = "give a dataset with rows"
                raise JobError(f"Dataset {entry.name} is empty", "no rows", fix)
            found = self.layout(entry, source, [row.values for row in sample])
            rows = chain(sample, rows)
            while part := list(islice(rows, CHUNK)):
                share = (number + part[-1].progress) / total
                yield [(r.where, r.values) for r in part], found, share

    def layout(self, entry: Entry, source: Source, sample: list[Any]) -> Layout:
        """Return where an entry's rows have what is read; note what was derived from its rows."""
        if self.recipe.pretrains:
            chosen = text_layout(entry, sample)
        else:
            chosen = layout(entry, sample, (row.values for row in source.rows()))
        pretrains, is_given = self.recipe.pretrains, None not in (entry.columns, entry.formatting)
        if entry.kind != "builtin" and (pretrains or not is_given):
            there = {column for row in sample if isinstance(row, dict) for column in row}
            read = {meaning: c for meaning, c in chosen.columns.items() if c in there}
            named = ", ".join(c if m == c else f"{c} (as {m})" for m, c in read.items())
            others = ", ".join(sorted(there - set(read.values())))
            how = f"read as {chosen.formatting}, columns {named or 'none'}"
            how = f"stage pt trains the text in {', '.join(read.values())}" if pretrains else how
            self.guessed[entry.name] = f"{entry.name}: {how}" + (
                f"; not {'trained' if pretrains else 'read'}: {others}" if others else ""
            )
        return chosen

    def _rows(self, entry: Entry, source: Source) -> Iterator[Row]:
        rows = source.rows()
        if entry.num_samples is not None:
            rows = self._drawn(list(rows), entry.num_samples)
        return islice(rows, self.data.max_samples)

    def _drawn(self, rows: list[Row], wanted: int) -> Iterator[Row]:
        """Draw rows at random; every row once before any comes again."""
        rounds = range(-(-wanted // len(rows)) if rows else 0)
        order = [i for turn in rounds for i in random_order(len(rows), self.seed, turn).tolist()]
        return (replace(rows[i], progress=n / wanted) for n, i in enumerate(order[:wanted], 1))


class RowProgress:
    """Progress of a long preparation: a bar on a terminal, else a line every few seconds."""

    def __init__(self, name: str, say: Say) -> None:
        self.name, self.say = name, say
        self.bar: Progress | None = None
        self.last_line = time.monotonic()

    def __enter__(self) -> "RowProgress":
        if sys.stdout.isatty():
            label, left = TextColumn("{task.description}"), TimeRemainingColumn()
            self.bar = Progress(label, BarColumn(), TaskProgressColumn(), left, transient=True)
            self.bar.add_task(f"Tokenizing {self.name}", total=1.0)
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, num_rows: int, share: float) -> None:
        """Show that `num_rows` rows, `share` of the dataset (0 to 1), are done."""
        if self.bar is not None:
            text = f"Tokenizing {self.name} ({plural(num_rows, 'row')})"
            self.bar.update(self.bar.task_ids[0], completed=share, description=text)
        elif time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            self.say(f"Tokenizing {self.name}: {plural(num_rows, 'row')}, {share:.0%}")


T = TypeVar("T")


def interleave(
    datasets: Sequence[Callable[[], Iterator[T]]],
    strategy: str,
    shares: Sequence[float] | None,
    seed: int,
) -> Iterator[tuple[int, T]]:
    """Yield the dataset's number and the next row of one drawn by `shares`, or of each in turn.

    interleave_under ends when one dataset has no more rows, interleave_over when each has been read
    once (shorter ones begin again), interleave_once when all rows were read, none of them twice.
    """
    random = np.random.default_rng(seed)
    rows = [dataset() for dataset in datasets]
    left, turn = set(range(len(rows))), 0
    while left:
        known = sorted(left) if strategy == "interleave_once" else list(range(len(rows)))
        if shares is None:
            chosen, turn = known[turn % len(known)], turn + 1
        else:
            weights = np.array([shares[i] for i in known])
            chosen = int(random.choice(known, p=weights / weights.sum()))
        row = next(rows[chosen], None)
        if row is not None:
            yield chosen, row
            continue
        left.discard(chosen)
        if strategy == "interleave_under":
            return
        if strategy == "interleave_over" and left:
            rows[chosen] = datasets[chosen]()
            yield chosen, next(rows[chosen])
