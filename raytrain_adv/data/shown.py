"""Rows as a person reads them: the text of their tokens, and which of them are trained on."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.read.entries import resolve
from raytrain_adv.data.tokens.datasets import TokenizedDatasets
from raytrain_adv.data.tokens.tokenize import Tokenizer, TokenRow
from raytrain_adv.data.tokens.tokenizer import load_tokenizer

LARGEST_SAMPLE = 1000
"""Rows that are read at most to find some that can be used."""


@dataclass(frozen=True)
class ShownToken:
    """A stretch of text of one token, or of several that are one character."""

    text: str
    ids: tuple[int, ...]
    is_trained: bool
    is_special: bool


@dataclass(frozen=True)
class ShownRow:
    """A row of a dataset after tokenization."""

    where: str
    roles: tuple[str, ...]
    tokens: tuple[ShownToken, ...]
    num_tokens: int
    num_trained: int
    num_before: int
    """Its tokens before cutoff_len was applied."""

    def marked(self) -> str:
        """Return the text; what is trained on stands between >> and <<."""
        runs = groupby(self.tokens, key=lambda token: token.is_trained)
        texts = ((trained, "".join(token.text for token in run)) for trained, run in runs)
        return "".join(f">>{text}<<" if trained else text for trained, text in texts)


def shown_rows(job: JobConfig, number: int) -> list[ShownRow]:
    """Return the first rows of the job's datasets that can be trained on."""
    tokenizer = load_tokenizer(job)
    most = min(job.data.max_samples or LARGEST_SAMPLE, max(LARGEST_SAMPLE, number))
    small = replace(job, data=job.data.model_copy(update={"max_samples": most}))
    entries = resolve(job.data.dataset, job.data, "dataset", job.source)
    datasets = TokenizedDatasets(small, tokenizer, entries, lambda sentence: None)
    tokenize = Tokenizer(tokenizer, datasets.recipe)
    found: list[ShownRow] = []
    for rows, layout, _ in datasets.tasks():
        values = dict(rows)
        for row in tokenize.rows(rows, layout)[0]:
            roles: tuple[str, ...] = ("text",)
            if not datasets.recipe.pretrains:
                messages = layout.conversation(values[row.where]).messages
                roles = tuple(_role(message) for message in messages)
            found.append(_shown(row, roles, tokenizer))
            if len(found) == number:
                return found
    return found


def _role(message: dict[str, object]) -> str:
    calls = message.get("tool_calls")
    return (
        f"{message['role']} (calls {len(calls)})"
        if isinstance(calls, list)
        else f"{message['role']}"
    )


def _shown(row: TokenRow, roles: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> ShownRow:
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    trained = row.trained.copy()
    trained[:1] = False  # nothing predicts the first token
    tokens = tuple(
        ShownToken(text, ids, bool(trained[at]), special.issuperset(ids))
        for at, ids, text in _texts(row.ids, trained, tokenizer)
    )
    return ShownRow(row.where, roles, tokens, len(row.ids), int(trained.sum()), row.num_before)


def _texts(
    ids: NDArray[np.int32], trained: NDArray[np.bool_], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[int, tuple[int, ...], str]]:
    """Yield where tokens start, the tokens, and their text, characters whole.

    A token's text is what it adds to that of the tokens before it: alone it may lack its space.
    """

    def decode(start: int, end: int) -> str:
        some = ids[start:end].tolist()
        return str(tokenizer.decode(some, clean_up_tokenization_spaces=False))

    before, at = 0, 0
    for end in range(1, len(ids) + 1):
        known, text = decode(before, at), decode(before, end)
        changes = end == len(ids) or trained[end] != trained[at]
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not changes and end - at < 4:
            continue
        yield at, tuple(ids[at:end].tolist()), text[len(known) :]
        before, at = at, end


def plain(row: ShownRow, most: int = 1200) -> str:
    """Return a row for a log: what is trained on stands between >> and <<; long ones are cut."""
    text = row.marked()
    if len(text) > most:
        text = f"{text[: most // 2]}\n[...]\n{text[-most // 2 :]}"
    numbers = f"{row.num_tokens:,} tokens, loss on {row.num_trained:,}"
    return f"First row ({row.where}; {numbers}, between >> and <<):\n{text}"
