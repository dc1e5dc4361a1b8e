"""What of a job's files is seen to be wrong in a moment: before Ray is asked, without torch, and in
the words in which it would be refused later.
"""

from __future__ import annotations

import json
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
from raytrain_adv.model.files import check_flash_package, check_folder, check_weights, is_local

TOKENIZER = "tokenizer.json"
NAMING_TOKENS = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
READ_AT_ONCE = 64 * 2**20
"""Bytes of a .json file, which is read as a whole, up to which its rows are counted here."""


def check_files(job: JobConfig) -> None:
    """Refuse what the files that this machine sees make impossible. What is on the Hub, and rows
    that turn out unusable, are found where they are fetched and tokenized.

    In a sweep a file that is missing ends its own trial only; here, what would end every one alike.

    Raises:
        JobError: as later, when the model or the data is read.
    """
    if job.sweep is None:
        _check(job)
        return
    found: dict[str, JobError | None] = {}
    for trial in job.sweep.trials:
        one = trial.job
        key = f"{one.model.model_dump()} {one.data.model_dump()}"
        if key not in found:
            found[key] = _refusal(one)
            if found[key] is None:
                return
    every = {str(error): error for error in found.values() if error is not None}
    if len(every) == 1:  # several are each said of the trial that they end
        raise next(iter(every.values()))


def _refusal(job: JobConfig) -> JobError | None:
    try:
        _check(job)
    except JobError as error:
        return error
    return None


def _check(job: JobConfig) -> None:
    check_folder(job)
    if not job.model.train_from_scratch:
        check_weights(job)
    check_flash_package(job.model.flash_attn)
    _check_template(job)
    _check_data(job)


def _check_template(job: JobConfig) -> None:
    template = None if job.data.template is None else find_template(job.data.template)
    folder = Path(job.model.model_name_or_path).expanduser()
    if not is_local(job) or not (folder / TOKENIZER).is_file() or job.model.trust_remote_code:
        return
    if template is None:
        if not _has_chat_template(folder):
            raise no_template(job.model.model_name_or_path)
    elif template.end_of_turn and not _has_token(folder, template.end_of_turn):
        raise unfit(template)


def _has_chat_template(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    beside = any("chat_template" in path.name for path in folder.iterdir())
    return beside or not config.is_file() or b"chat_template" in config.read_bytes()


def _has_token(folder: Path, token: str) -> bool:
    """Whether a file of the tokenizer names a token. Files are parsed only where the token, as it
    is usually written, is in none of them.
    """
    there = [path for name in NAMING_TOKENS if (path := folder / name).is_file()]
    if any(token.encode() in path.read_bytes() for path in there):
        return True
    try:
        return any(_holds(json.loads(path.read_bytes()), token) for path in there)
    except ValueError:  # said where the tokenizer is loaded
        return True


def _holds(value: Any, token: str) -> bool:
    if isinstance(value, dict):
        return token in value or any(_holds(one, token) for one in value.values())
    if isinstance(value, list):
        return any(_holds(one, token) for one in value)
    return bool(value == token)


def _check_data(job: JobConfig) -> None:
    """Refuse datasets that are not there, and a val_size that their rows are too few for."""
    data, enough = job.data, _enough(job.data.val_size)
    entries = resolve(data.dataset, data, "dataset")
    if data.eval_dataset is not None:
        entries_held_out = resolve(data.eval_dataset, data, "eval_dataset")
        for entry in entries_held_out:
            _files(entry)
    counts = [_rows_up_to(enough, entry, data.max_samples) for entry in entries]
    if data.val_size and None not in counts:
        rows = sum(count for count in counts if count is not None)
        if rows < enough:
            num_held_out(rows, data.val_size, "rows")


def _enough(val_size: float) -> int:
    """Return a number of rows that suffices to hold some out and to keep some."""
    if val_size >= 1 or not val_size:
        return int(val_size) + 1 if val_size else 0
    return math.ceil(1 / min(val_size, 1 - val_size))


def _rows_up_to(enough: int, entry: Entry, max_samples: int | None) -> int | None:
    """Return how many rows a dataset has, counted up to `enough`; none where that takes long."""
    files = _files(entry)
    if not files or any(
        f.suffix.lower() == ".json" and f.stat().st_size > READ_AT_ONCE for f in files
    ):
        return None
    if entry.num_samples is not None:
        rows = entry.num_samples
    else:
        rows = sum(1 for _ in islice(read_files(files), enough))
    return min(rows, rows if max_samples is None else max_samples)


def _files(entry: Entry) -> list[Path]:
    """Return a dataset's files; none of one that is elsewhere, or made here."""
    return data_files(Path(entry.target)) if entry.kind == "files" else []
