"""From a chunk of rows to token ids with a loss mask."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from raytrain_adv.data.read.formats import Conversation, Layout, UnusableRow
from raytrain_adv.data.tokens.limits import MOST_CHARACTERS, no_panics, template_time
from raytrain_adv.data.tokens.page import Piece
from raytrain_adv.data.tokens.render import Renderer, renderer
from raytrain_adv.errors import JobError

RawRow = tuple[str, Any]
"""Where a row stands, and its columns."""


@dataclass(frozen=True)
class Recipe:
    """The job keys that decide which tokens a row becomes."""

    template: str | None
    default_system: str | None
    cutoff_len: int
    train_on_prompt: bool
    mask_history: bool
    enable_thinking: bool | None = True


@dataclass
class Chunk:
    """Tokenized rows, one after the other."""

    ids: NDArray[np.int32]
    """[tokens]"""
    trained: NDArray[np.bool_]
    """[tokens]"""
    lengths: NDArray[np.int64]
    """[rows]"""
    answer_starts: NDArray[np.int32]
    """[rows]"""
    num_read: int = 0
    num_cut: int = 0
    """Rows that were longer than cutoff_len, among those used."""
    unusable: list[tuple[str, str]] = field(default_factory=list)
    """Where, and why."""


class Tokenizer:
    """Turns chunks of rows into tokens, which do not depend on how the rows are chunked."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        self.tokenizer, self.recipe = tokenizer, recipe
        with template_time("of a conversation that tries it"):
            self.render: Renderer = renderer(
                tokenizer,
                recipe.template,
                recipe.default_system,
                recipe.enable_thinking,
                recipe.mask_history,
            )
        self.longest = max(MOST_CHARACTERS, 64 * recipe.cutoff_len)
        self.encode = _encode_pieces if joins_cleanly(tokenizer) else _encode_whole
        if self.encode is _encode_whole and not tokenizer.is_fast:
            what = "This tokenizer does not report the positions of its tokens in the text"
            fix = "use a model folder with a tokenizer.json"
            raise JobError(what, type(tokenizer).__name__, fix)

    def __call__(self, rows: list[RawRow], layout: Layout) -> Chunk:
        """Tokenize a chunk."""
        unusable: list[tuple[str, str]] = []
        places, rendered = [], []
        span = f"{rows[0][0]} to {rows[-1][0]}" if rows else "no rows"
        with template_time(span):
            for where, values in rows:
                try:
                    rendered.append(self._pieces(layout.conversation(values)))
                    places.append(where)
                except UnusableRow as reason:
                    unusable.append((where, str(reason)))
        with no_panics(span):
            encoded = self.encode(self.tokenizer, rendered)
        chunk = self._cut(places, encoded, unusable)
        chunk.num_read = len(rows)
        return chunk

    def _pieces(self, conversation: Conversation) -> list[Piece]:
        pieces = self.render(conversation)
        if not any(p.is_answer for p in pieces):
            raise UnusableRow("no answer: the chat template writes none")
        if (size := sum(len(p.text) for p in pieces)) > self.longest:
            raise UnusableRow(f"{size:,} characters, more than {self.longest:,}")
        return pieces

    def _cut(
        self, places: list[str], encoded: list["_Encoded"], unusable: list[tuple[str, str]]
    ) -> Chunk:
        cutoff = self.recipe.cutoff_len
        kept, num_cut = [], 0
        for where, row in zip(places, encoded, strict=True):
            if row is None:
                unusable.append((where, _SPANS_BOTH))
                continue
            trained = self._mask(row)[:cutoff]
            if not trained[1:].any():
                reason = f"the answer begins at token {row.answer_start + 1}, beyond cutoff_len"
                unusable.append((where, reason))
                continue
            num_cut += len(row.ids) > cutoff
            kept.append((row.ids[:cutoff], trained, min(row.answer_start, cutoff)))
        return Chunk(
            ids=np.concatenate([k[0] for k in kept] or [np.zeros(0, np.int32)]),
            trained=np.concatenate([k[1] for k in kept] or [np.zeros(0, np.bool_)]),
            lengths=np.array([len(k[0]) for k in kept], dtype=np.int64),
            answer_starts=np.array([k[2] for k in kept], dtype=np.int32),
            num_cut=num_cut,
            unusable=unusable,
        )

    def _mask(self, row: "_Tokens") -> NDArray[np.bool_]:
        if self.recipe.train_on_prompt:
            return np.ones(len(row.ids), dtype=np.bool_)
        if self.recipe.mask_history:
            return row.is_answer & (np.arange(len(row.ids)) >= row.answer_start)
        return row.is_answer


@dataclass(frozen=True, slots=True)
class _Tokens:
    ids: NDArray[np.int32]
    is_answer: NDArray[np.bool_]
    answer_start: int
    """Where the last answer begins."""


_Encoded = _Tokens | None
_SPANS_BOTH = "a token spans the end of the prompt and the answer; set template in the job"


def joins_cleanly(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether texts tokenized one by one and joined are the joined text, without a space more or
    less: true of byte-level tokenizers, false of those of Llama 2 and Mistral 7B.
    """
    for pair in (("a:", " b"), ("a\n", "b"), ("a", "b"), ("a ", " b")):
        first, second = tokenizer(list(pair), add_special_tokens=False)["input_ids"]
        if tokenizer.decode(first + second, clean_up_tokenization_spaces=False) != "".join(pair):
            return False
    return True


def _batch_encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], offsets: bool) -> Any:
    """Tokenize texts, in parallel threads of the tokenizer's own."""
    unused = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    return tokenizer(texts, add_special_tokens=False, return_offsets_mapping=offsets, **unused)


def _encode_pieces(
    tokenizer: PreTrainedTokenizerBase, rendered: list[list[Piece]]
) -> list[_Encoded]:
    """Tokenize prompts and answers separately, as in generation."""
    texts = [piece.text for pieces in rendered for piece in pieces]
    ids = iter(_batch_encode(tokenizer, texts, offsets=False)["input_ids"] if texts else [])
    encoded: list[_Encoded] = []
    for pieces in rendered:
        parts = [next(ids) for _ in pieces]
        lengths = [len(part) for part in parts]
        answers = [i for i, piece in enumerate(pieces) if piece.is_answer]
        tokens = np.fromiter(chain.from_iterable(parts), dtype=np.int32, count=sum(lengths))
        is_answer = np.repeat([piece.is_answer for piece in pieces], lengths)
        encoded.append(_Tokens(tokens, is_answer, sum(lengths[: answers[-1]])))
    return encoded


def _encode_whole(
    tokenizer: PreTrainedTokenizerBase, rendered: list[list[Piece]]
) -> list[_Encoded]:
    """Tokenize whole conversations and find the answers' tokens by where they lie in the text; None
    where a token spans a prompt and its answer.
    """
    if not rendered:
        return []
    texts = ["".join(p.text for p in pieces) for pieces in rendered]
    both = _batch_encode(tokenizer, texts, offsets=True)
    before = [_first_prompt(pieces) for pieces in rendered]
    prompts = _batch_encode(tokenizer, before, offsets=False)["input_ids"]
    encoded: list[_Encoded] = []
    for pieces, ids, offsets, prompt in zip(
        rendered, both["input_ids"], both["offset_mapping"], prompts, strict=True
    ):
        borders = np.cumsum([len(p.text) for p in pieces])
        spans = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        piece_of = np.searchsorted(borders, spans[:, 0], side="right").clip(max=len(pieces) - 1)
        if ids[: len(prompt)] != prompt or (spans[:, 1] > borders[piece_of]).any():
            encoded.append(None)
            continue
        answers = [i for i, piece in enumerate(pieces) if piece.is_answer]
        is_answer = np.array([piece.is_answer for piece in pieces])[piece_of]
        start = int(np.searchsorted(piece_of, answers[-1]))
        encoded.append(_Tokens(np.array(ids, dtype=np.int32), is_answer, start))
    return encoded


def _first_prompt(pieces: Iterable[Piece]) -> str:
    """Return the text before the first answer."""
    return "".join(piece.text for piece in takewhile(lambda piece: not piece.is_answer, pieces))


def reasons(unusable: list[tuple[str, str]]) -> dict[str, int]:
    """Count unusable rows by reason, numbers in the reasons left out."""
    return dict(Counter("".join("#" if c.isdigit() else c for c in why) for _, why in unusable))
