"""From the job's data keys to sequences: resolve, read, tokenize or open the cache, split, pack."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.batches.order import num_held_out, random_order
from raytrain_adv.data.batches.sequences import SequenceSet, TokenRows, pack
from raytrain_adv.data.read.entries import Entry, resolve
from raytrain_adv.data.tokens import cache
from raytrain_adv.data.tokens.cache import Say
from raytrain_adv.data.tokens.datasets import NUM_SHOWN, TokenizedDatasets
from raytrain_adv.data.tokens.saved import Saved, find_saved
from raytrain_adv.data.tokens.tokenizer import load_tokenizer
from raytrain_adv.errors import JobError
from raytrain_adv.model.config_file import read_config
from raytrain_adv.model.vocabulary import num_rows
from raytrain_adv.text import plural

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
    """JSON: what _stats() returns."""
    eval_each: dict[str, SequenceSet] = field(default_factory=dict)
    """The rows of each eval_dataset, if they are evaluated one by one."""

    def prompts(self, n: int, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
        """Return `n` prompts spread over the held-out rows, if any, else the training rows."""
        source = self.eval or self.train
        rows = np.concatenate(source.members)
        picked = np.unique(np.linspace(0, len(rows) - 1, min(n, len(rows))).astype(int))
        return [_prompt(source.rows, int(row), tokenizer) for row in rows[picked]]


def _prompt(rows: TokenRows, row: int, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    ids = rows.tokens(row).tolist()
    start = int(rows.answer_starts[row])
    parts = [str(tokenizer.decode(p, skip_special_tokens=True)) for p in (ids[:start], ids[start:])]
    return Prompt(ids[:start], parts[0].strip(), parts[1].strip())


def prepare(job: JobConfig, say: Say, *, rebuild: bool | None = None) -> PreparedData:
    """Tokenize the job's datasets, or open them if that is done, and form sequences of them.

    May be called by any number of processes at once: of those that share a file system one
    tokenizes, the others wait and open the result. They need no connection to each other.

    `rebuild` tokenizes even if it was done before; None means the job's overwrite_cache. Workers
    whose driver has prepared the data pass False. Raises JobError if a dataset cannot be found,
    read or understood, or no row of it can be used, and StorageError if the tokenized data cannot
    be written.
    """
    data = job.data
    tokenizer = load_tokenizer(job)
    again = data.overwrite_cache if rebuild is None else rebuild
    saved = find_saved(data.tokenized_path, data.cutoff_len)
    eval_part, each = None, {}
    if saved:
        train_part, eval_part = _saved(job, saved, say)
    else:
        entries = resolve(data.dataset, data, "dataset", job.source)
        train_part = _tokenized(job, tokenizer, entries, again, say)
    if data.eval_dataset is not None and not saved:
        entries = resolve(data.eval_dataset, data, "eval_dataset", job.source)
        eval_part = _tokenized(job, tokenizer, entries, again, say)
        for entry in entries if job.output.eval_on_each_dataset else ():
            rows = _tokenized(job, tokenizer, [entry], again, say).rows
            each[entry.name] = _sequences(rows, np.arange(len(rows)), job)
    train_rows, eval_rows = _split(len(train_part.rows), data.val_size, job.train.seed)
    train = _sequences(train_part.rows, train_rows, job)
    held_out = None
    if eval_part is not None:
        held_out = _sequences(eval_part.rows, np.arange(len(eval_part.rows)), job)
    elif len(eval_rows):
        held_out = _sequences(train_part.rows, eval_rows, job)
    for part in (train_part, eval_part):
        if part is not None:
            _check_ids(job, tokenizer, part.rows)
    stats = _stats(job, train, held_out, train_part, eval_part)
    for sentence in _sentences(stats):
        say(sentence)
    for key, name in (("rows", "dataset"), ("eval_rows", "eval_dataset")):
        _refuse_mostly_unusable(stats[key], name, data.max_unusable_share)
    return PreparedData(train, held_out, stats, each)


def _refuse_mostly_unusable(rows: dict[str, Any] | None, key: str, most: float) -> None:
    share = rows["unusable"] / rows["read"] if rows and rows["read"] else 0.0
    if rows is None or share <= most:
        return
    reasons = sorted(rows["unusable_reasons"].items(), key=lambda one: -one[1])
    lines = [f"{number:,} x {reason}" for reason, number in reasons[:NUM_SHOWN]]
    lines += [f"{one['where']}: {one['reason']}" for one in rows["unusable_examples"][:NUM_SHOWN]]
    raise JobError(
        f"{share:.0%} of the rows of {key} cannot be trained on",
        "\n".join([f"{rows['unusable']:,} of {rows['read']:,} rows are left out", *lines]),
        "correct the rows, formatting and columns in dataset_info.json, template or cutoff_len; "
        f"max_unusable_share: {min(math.ceil(share * 100) / 100, 1.0)} trains on the others",
    )


def _check_ids(job: JobConfig, tokenizer: PreTrainedTokenizerBase, rows: TokenRows) -> None:
    """Refuse data with token ids for which the model's embedding has no row."""
    config = read_config(job)
    known = num_rows(job, int(config.get_text_config().vocab_size))
    used = max(int(rows.ids.max()), int(tokenizer.pad_token_id or 0))
    if used >= known:
        raise JobError(
            "the data has tokens that the model has no embedding for",
            f"{tokenizer.convert_ids_to_tokens(used)!r} is token {used}, and the embedding has "
            f"{known} rows (vocab_size)",
            "take the tokenizer that belongs to the model, or set resize_vocab: true",
        )


def _saved(
    job: JobConfig, saved: Mapping[str, Saved], say: Say
) -> tuple[cache.CacheEntry, cache.CacheEntry | None]:
    """Return the rows of a folder that LLaMA-Factory saved, to train on and to evaluate."""
    if "train" not in saved:
        what = f"tokenized_path: {job.data.tokenized_path} has no part to train on"
        fix = "name the folder that holds train and validation, or one dataset"
        raise JobError(what, f"it has {', '.join(saved)}", fix)
    say(f"tokenized_path: {job.data.tokenized_path} has tokenized rows; dataset is not read")
    root = cache.cache_root(None)
    parts = [saved["train"], *([saved["validation"]] if "validation" in saved else [])]
    found = [cache.open_or_build(root, part.key(), part.build, False, say) for part in parts]
    return found[0], found[1] if len(found) > 1 else None


def _tokenized(
    job: JobConfig,
    tokenizer: PreTrainedTokenizerBase,
    entries: list[Entry],
    again: bool,
    say: Say,
) -> cache.CacheEntry:
    datasets = TokenizedDatasets(job, tokenizer, entries, say)
    root = cache.cache_root(job.data.tokenized_path)
    return cache.open_or_build(root, datasets.key(), datasets.build, again, say)


def _split(n: int, val_size: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows to train on and the rows held out, each in file order."""
    num_held = num_held_out(n, val_size, "usable rows")
    order = random_order(n, seed, _SPLIT)
    return np.sort(order[num_held:]), np.sort(order[:num_held])


def _sequences(rows: TokenRows, chosen: NDArray[np.int64], job: JobConfig) -> SequenceSet:
    if not job.packs:
        return SequenceSet(rows, [chosen[i : i + 1] for i in range(len(chosen))])
    groups = pack(rows.lengths[chosen], job.data.cutoff_len)
    return SequenceSet(rows, [chosen[group] for group in groups])


def _stats(
    job: JobConfig,
    train: SequenceSet,
    held_out: SequenceSet | None,
    train_part: cache.CacheEntry,
    eval_part: cache.CacheEntry | None,
) -> dict[str, Any]:
    data, packed = job.data, job.packs
    return {
        "rows": train_part.stats,
        "eval_rows": eval_part.stats if eval_part else None,
        "train": _describe(train, data.cutoff_len, packed),
        "eval": _describe(held_out, data.cutoff_len, packed) if held_out else None,
        "cutoff_len": data.cutoff_len,
        "split_special_tokens": data.split_special_tokens,
        "cache_path": str(train_part.path),
        "eval_cache_path": str(eval_part.path) if eval_part else None,
    }


def _describe(sequences: SequenceSet, cutoff_len: int, packed: bool) -> dict[str, Any]:
    """Return the numbers of one set: rows, sequences, tokens, lengths of its conversations."""
    members = np.concatenate(sequences.members)
    num_tokens = int(sequences.lengths.sum())
    numbers: dict[str, Any] = {
        "rows": len(members),
        "sequences": len(sequences),
        "tokens": num_tokens,
        "label_tokens": int(sequences.label_counts.sum()),
        "lengths": _percentiles(sequences.rows.lengths[members]),
        "histogram": _histogram(sequences.rows.lengths[members]),
    }
    if packed:
        numbers["packing_efficiency"] = round(num_tokens / (len(sequences) * cutoff_len), 4)
    return numbers


def _percentiles(lengths: NDArray[np.int64]) -> dict[str, float]:
    points = {"min": 0, "p10": 10, "median": 50, "p90": 90, "p99": 99, "max": 100}
    found = {name: float(np.percentile(lengths, point)) for name, point in points.items()}
    return {**found, "mean": round(float(lengths.mean()), 1)}


def _histogram(lengths: NDArray[np.int64]) -> dict[str, list[int]]:
    """Count lengths in up to 20 bins: bin i has those with edges[i] <= length < edges[i + 1]."""
    step = max(1, -(-(int(lengths.max()) + 1) // 20))
    edges = np.arange(0, int(lengths.max()) + step + 1, step)
    return {"edges": edges.tolist(), "counts": np.histogram(lengths, edges)[0].tolist()}


def _unusable_sentence(rows: dict[str, Any]) -> str:
    """Name the first unusable rows and count all."""
    examples = rows["unusable_examples"][:NUM_SHOWN]
    shown = "; ".join(f"{e['where']}: {e['reason']}" for e in examples)
    more = rows["unusable"] - len(examples)
    rest = f"; and {more:,} more" if more else ""
    return f"{rows['unusable']:,} of {rows['read']:,} rows cannot be used: {shown}{rest}"


def _sentences(stats: dict[str, Any]) -> list[str]:
    """Return the sentences that summarize the data."""
    lines = []
    for name in ("train", "eval"):
        numbers = stats[name]
        if numbers is None:
            continue
        share = numbers.get("packing_efficiency")
        packed = "" if share is None else f", packed {share:.0%} full"
        lines.append(
            f"Data for {name}: {plural(numbers['rows'], 'conversation')} in "
            f"{plural(numbers['sequences'], 'sequence')}, {numbers['tokens']:,} tokens, "
            f"loss on {numbers['label_tokens']:,}{packed}"
        )
    for rows in (stats["rows"], stats["eval_rows"]):
        if rows and rows["with_control_tokens"]:
            how = "read as the letters they are"
            if not stats["split_special_tokens"]:
                how = "read as such; split_special_tokens: true reads them as letters"
            number = rows["with_control_tokens"]
            lines.append(f"{plural(number, 'row')} with control tokens in messages, {how}")
        lines += rows.get("guessed", ()) if rows else ()
        if rows and rows["unusable"]:
            lines.append(_unusable_sentence(rows))
        if rows and rows["truncated"]:
            number = plural(rows["truncated"], "row")
            lines.append(f"{number} cut at cutoff_len ({stats['cutoff_len']})")
    return lines
