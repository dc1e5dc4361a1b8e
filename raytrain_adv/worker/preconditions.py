"""Fast checks of a job's files before Ray starts, without torch; errors are the later ones."""

import math
from itertools import islice
from pathlib import Path
from typing import Any

from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.batches.order import num_held_out
from raytrain_adv.data.read.entries import Entry, resolve
from raytrain_adv.data.read.sources import data_files, read_files
from raytrain_adv.data.tokens.templates import find_template, no_template, unfit
from raytrain_adv.errors import JobError
from raytrain_adv.model.files import (
    check_flash_package,
    check_weights,
    is_local,
    require_reachable,
)
from raytrain_adv.text import parse_json

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
NAMING_TOKENS = (TOKENIZER, CONFIG, "special_tokens_map.json", "added_tokens.json")
READ_AT_ONCE = 64 * 2**20
"""Largest .json file (bytes) whose rows are counted here; it is read as a whole."""


def check_files(job: JobConfig) -> None:
    """Refuse a job, or a sweep whose trials are all so, that the files here make impossible. Files
    on the Hub are checked when they are fetched, rows when they are tokenized. Raises JobError: the
    same as later, when the model or the data is read.
    """
    if job.sweep is None:
        _check(job)
        return
    jobs = [trial.job for trial in job.sweep.trials]
    distinct = {f"{one.model.model_dump()} {one.data.model_dump()}": one for one in jobs}
    errors: dict[str, JobError] = {}
    for one in distinct.values():
        try:
            _check(one)
        except JobError as error:
            errors[str(error)] = error
        else:
            return
    if len(errors) == 1:  # different ones are reported with the trial that each ends
        raise next(iter(errors.values()))


def _check(job: JobConfig) -> None:
    require_reachable(job)
    if not job.model.train_from_scratch:
        check_weights(job)
    check_flash_package(job.model.flash_attn)
    _check_template(job)
    _check_data(job)


def _check_template(job: JobConfig) -> None:
    template = None if job.data.template is None else find_template(job.data.template)
    folder = Path(job.model.model_name_or_path)
    if not is_local(job) or not (folder / TOKENIZER).is_file() or job.model.trust_remote_code:
        return
    if template is None:
        if job.train.stage == "sft" and not _has_chat_template(folder):
            raise no_template(job.model.model_name_or_path)
    elif template.end_of_turn and not _has_token(folder, template.end_of_turn):
        raise unfit(template)


def _has_chat_template(folder: Path) -> bool:
    config = folder / CONFIG
    has_file = any("chat_template" in path.name for path in folder.iterdir())
    return has_file or not config.is_file() or b"chat_template" in config.read_bytes()


def _has_token(folder: Path, token: str) -> bool:
    files = [path.read_bytes() for name in NAMING_TOKENS if (path := folder / name).is_file()]
    if any(token.encode() in file for file in files):  # as it is usually written: no parsing
        return True
    try:
        return any(_contains(parse_json(file), token) for file in files)
    except ValueError:  # reported when the tokenizer is loaded
        return True


def _contains(value: Any, token: str) -> bool:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        return any(_contains(one, token) for one in value)
    return bool(value == token)


def _check_data(job: JobConfig) -> None:
    """Refuse missing datasets, and a val_size for which there are too few rows."""
    data, enough = job.data, _enough(job.data.val_size)
    entries = resolve(data.dataset, data, "dataset")
    if data.eval_dataset is not None:
        for entry in resolve(data.eval_dataset, data, "eval_dataset"):
            _files(entry)
    counts = [_rows_up_to(enough, entry, data.max_samples) for entry in entries]
    known = [count for count in counts if count is not None]
    if data.val_size and len(known) == len(counts) and sum(known) < enough:
        num_held_out(sum(known), data.val_size, "rows")


def _enough(val_size: float) -> int:
    """Return how many rows suffice to hold some out and keep some for training."""
    if val_size >= 1 or not val_size:
        return int(val_size) + 1 if val_size else 0
    return math.ceil(1 / min(val_size, 1 - val_size))


def _rows_up_to(enough: int, entry: Entry, max_samples: int | None) -> int | None:
    """Return how many rows a dataset has, counted up to `enough`; None if that takes long."""
    files = _files(entry)
    whole = [f for f in files if f.suffix.lower() == ".json"]
    if not files or any(f.stat().st_size > READ_AT_ONCE for f in whole):
        return None
    rows = entry.num_samples
    if rows is None:
        rows = sum(1 for _ in islice(read_files(files), enough))
    return rows if max_samples is None else min(rows, max_samples)


def _files(entry: Entry) -> list[Path]:
    """Return a dataset's files; empty for one that is generated or not on this machine."""
    return data_files(Path(entry.target)) if entry.kind == "files" else []
