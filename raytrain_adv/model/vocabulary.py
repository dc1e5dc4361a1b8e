"""The checkpoint's tokenizer with the job's new tokens, and tables with a row for each of them."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from raytrain_adv.config.job import JobConfig
from raytrain_adv.dtensor import Region, seed_of
from raytrain_adv.errors import JobError, no_panics
from raytrain_adv.model.config_file import read_config
from raytrain_adv.model.files import refuse_pipes, require_reachable
from raytrain_adv.text import listed, plural
from raytrain_adv.transforms.modules import token_tables
from raytrain_adv.transforms.vocabulary import Vocabulary

MULTIPLE = 64  # rows of resized tables, as in LLaMA-Factory
CHUNK = 8192  # rows that are read at once to add them up


def read_tokenizer(job: JobConfig) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, and add the job's tokens. Raises JobError if it does not load."""
    name, vocabulary = job.model.model_name_or_path, job.transform(Vocabulary)
    require_reachable(job)
    with _readable(job):
        loaded = _load(*_place(job))
    if not isinstance(loaded, PreTrainedTokenizerBase):
        raise JobError(
            f"{name} has no text tokenizer", type(loaded).__name__, "choose a causal language model"
        )
    loaded.add_tokens(list(vocabulary.words))
    loaded.add_tokens(list(vocabulary.special), special_tokens=True)
    return loaded


def _place(job: JobConfig) -> tuple[str, str, str | None, bool]:
    model = job.model
    where = (model.model_name_or_path, model.model_revision, model.cache_dir)
    return (*where, model.trust_remote_code)


def _load(name: str, revision: str, cache_dir: str | None, trust_remote_code: bool) -> Any:
    folder = Path(name)
    if folder.is_dir():
        refuse_pipes(name, folder)
    with no_panics(f"the files of {name}"):
        return AutoTokenizer.from_pretrained(
            name, revision=revision, cache_dir=cache_dir, trust_remote_code=trust_remote_code
        )


@contextmanager
def _readable(job: JobConfig) -> Iterator[None]:
    """Turn whatever transformers raises on a malformed config or tokenizer into a JobError."""
    try:
        yield
    except JobError:
        raise
    except Exception as error:  # anything: the files are read by code for each kind of tokenizer
        read_config(job)  # raises the better error if the model's config is what is wrong
        name, inside = job.model.model_name_or_path, "no such folder here"
        if Path(name).is_dir():
            inside = ", ".join(sorted(p.name for p in Path(name).iterdir())[:8])
        raise JobError(
            f"The tokenizer of {name} could not be loaded",
            f"{inside}\n{type(error).__name__}: {error}"[:600],
            "point model_name_or_path to a folder with tokenizer.json, or to a model on the Hub",
        ) from error


@dataclass(frozen=True)
class Size:
    """The tokenizer in numbers."""

    num_ids: int  # rows that its largest id needs
    added: tuple[str, ...]
    """The job's tokens that the checkpoint's tokenizer lacks."""


def tokenizer_size(job: JobConfig) -> Size:
    """Return the size of the tokenizer with the job's tokens. Raises JobError if it cannot be
    loaded.
    """
    vocabulary = job.transform(Vocabulary)
    with _readable(job):
        return _size(_place(job), vocabulary.words, vocabulary.special)


@cache  # a run builds its model several times, and a large tokenizer takes seconds
def _size(
    place: tuple[str, str, str | None, bool], words: tuple[str, ...], special: tuple[str, ...]
) -> Size:
    tokenizer = _load(*place)
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([*words, *special])
    last = max(tokenizer.get_vocab().values(), default=-1)
    return Size(last + 1, tuple(t for t in (*words, *special) if t not in known))


def num_rows(job: JobConfig, rows: int) -> int:
    """Return how many rows the job's embedding has if the checkpoint's has `rows`."""
    if not job.transform(Vocabulary).resize_vocab:
        return rows
    needed = tokenizer_size(job).num_ids
    return rows if needed <= rows else math.ceil(needed / MULTIPLE) * MULTIPLE


def resize(model: PreTrainedModel, job: JobConfig) -> None:
    """Give a model on the meta device, and its config, a row for each token, as transformers does.
    Raises JobError if transformers cannot resize this architecture.
    """
    untyped: Any = model
    rows = int(untyped.get_input_embeddings().weight.shape[0])
    wanted = num_rows(job, rows)
    if wanted == rows:
        return
    fix = "delete resize_vocab, add_tokens and add_special_tokens"
    for name, held in untyped.named_buffers():
        if held.shape[:1] == (rows,):  # DeepSeek-V4's experts of each token
            found = f"{name} has a row for each of {rows} tokens, and none for new ones"
            raise JobError(f"{type(model).__name__} cannot get new tokens", found, fix)
    try:
        model.resize_token_embeddings(wanted, mean_resizing=False)
        made = int(untyped.get_output_embeddings().weight.shape[0])
    except (NotImplementedError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        made = -1
        cause: Exception | None = error
    else:
        cause = None
    if made != wanted:
        found = f"{type(cause).__name__}: {cause}" if cause else f"its head has {made} rows"
        raise JobError(
            f"transformers does not resize {type(model).__name__}",
            f"resize_vocab: true for {wanted} rows; {found}",
            fix,
        ) from cause


def tables(plain: PreTrainedModel) -> set[str]:
    """Return the names of the parameters that have a row for each token."""
    held = {id(p) for m in token_tables(plain) for p in m.parameters(recurse=False)}
    return {name for name, p in plain.named_parameters() if id(p) in held}


@dataclass(frozen=True)
class NewRows:
    """How rows that a checkpoint lacks are filled: by the mean of the others and noise of standard
    deviation 1 / sqrt(columns), the same on any number of ranks.

    Source: _noisy_mean_initialization of LLaMA-Factory.
    """

    seed: int

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        total: int,
        read: Callable[[Region], torch.Tensor],
        region: Region | None,
    ) -> torch.Tensor:
        """Return a region of a table of `total` rows, of which `read` returns the first ones, those
        of `shape`.
        """
        held, columns = shape[0], shape[1:]
        rows, *rest = region or (slice(0, total), *(slice(0, n) for n in columns))
        stored = read((slice(rows.start, min(rows.stop, held)), *rest))
        if rows.stop <= held:
            return stored
        mean = _mean(read, held, columns)
        new = mean.expand(total - held, *columns).clone()
        if columns:
            generator = torch.Generator().manual_seed(seed_of(self.seed, f"rows of {name}"))
            new += torch.randn(new.shape, generator=generator) / math.sqrt(columns[-1])
        chosen = new[(slice(max(rows.start - held, 0), rows.stop - held), *rest)]
        return torch.cat([stored, chosen.to(stored.dtype)])


def _mean(
    read: Callable[[Region], torch.Tensor], rows: int, columns: tuple[int, ...]
) -> torch.Tensor:
    """Return the mean of all rows in float32, of which a chunk is in memory."""
    total = torch.zeros(columns, dtype=torch.float64)
    for first in range(0, rows, CHUNK):
        part = read((slice(first, min(first + CHUNK, rows)), *(slice(0, n) for n in columns)))
        total += part.double().sum(0)
    return (total / rows).float()


def new_rows(job: JobConfig) -> NewRows | None:
    """Return how the job fills rows that the checkpoint lacks; none if it adds none."""
    return NewRows(job.train.seed) if job.transform(Vocabulary).resize_vocab else None


def describe(job: JobConfig, model: PreTrainedModel, rows: int) -> str:
    """Return in a sentence what resize_vocab does to a checkpoint with `rows` rows."""
    size = tokenizer_size(job)
    tokens = listed([repr(token) for token in size.added]) if size.added else "none is new"
    wanted = num_rows(job, rows)
    if wanted == rows:
        return (
            f"resize_vocab adds no row: the embedding has {rows:,} for {size.num_ids:,} token "
            f"ids; new tokens: {tokens}"
        )
    named = " and ".join(sorted({n.rpartition(".")[0] for n in tables(model)}))
    untyped: Any = model
    width = int(untyped.get_input_embeddings().weight.shape[1])
    filled = (
        "with random weights, as all"
        if job.model.train_from_scratch
        else f"with the mean of the others and noise of {1 / math.sqrt(width):.3g}"
    )
    return (
        f"resize_vocab adds {plural(wanted - rows, 'row')} to {named}, {rows:,} -> {wanted:,}, for "
        f"{size.num_ids:,} token ids in multiples of {MULTIPLE}, filled {filled}; new tokens: "
        f"{tokens}"
    )
