"""From a chunk of rows to token ids with a loss mask."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import chain, count, takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from raytrain_adv.data.read.formats import Conversation, Layout, UnusableRow
from raytrain_adv.data.tokens.control import ControlTokens
from raytrain_adv.data.tokens.limits import (
    MOST_CHARACTERS,
    MOST_MESSAGES,
    template_time,
    tokenizer_errors,
)
from raytrain_adv.data.tokens.own_template import OwnTemplate
from raytrain_adv.data.tokens.page import Page, Piece, in_pieces, with_system
from raytrain_adv.data.tokens.templates import find_template
from raytrain_adv.errors import JobError
from raytrain_adv.text import plural

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
    pretrains: bool = False
    """Whether rows are plain text, of which every token is trained."""
    split_special_tokens: bool = False


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
    cut: list[tuple[str, int]] = field(default_factory=list)
    """Rows, among those used, that were longer than cutoff_len: where, and how many tokens."""
    num_control: int = 0
    """Rows with control tokens in their messages, among those read."""
    unusable: list[tuple[str, str]] = field(default_factory=list)
    """Where, and why."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A tokenized row."""

    where: str
    ids: NDArray[np.int32]
    """[tokens]"""
    trained: NDArray[np.bool_]
    """[tokens]"""
    answer_start: int
    """Where the last answer begins."""
    num_before: int
    """Its tokens before it was cut."""


Renderer = Callable[[Conversation], list[Piece]]


def renderer(
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    default_system: str | None,
    thinks: bool | None = True,
    drops_thoughts: bool = False,
) -> Renderer:
    """Return the function that renders conversations with a template; None: the tokenizer's own.

    `default_system` is the system message of conversations without one; None: the template's.
    `thinks` and `drops_thoughts` are those of `Template.write`.
    """
    if template is None:
        return OwnTemplate(tokenizer, _own(tokenizer), default_system, thinks)
    source = find_template(template).write(thinks, drops_thoughts)

    def render(conversation: Conversation) -> list[Piece]:
        messages = with_system(conversation.messages, default_system)
        text, spans = Page(tokenizer, source, conversation.tools).marked(messages)
        return in_pieces(text, spans)

    return render


def _own(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's chat template. Raises JobError if it has none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several templates by name, as some model folders have them
        template = template.get("default")
    if not isinstance(template, str):
        what = "The tokenizer has no default chat template"
        raise JobError(what, str(template)[:80], "set template in the job")
    return template


class Tokenizer:
    """Turns chunks of rows into tokens, which do not depend on how the rows are chunked."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        self.tokenizer, self.recipe = tokenizer, recipe
        self.longest = max(MOST_CHARACTERS, 64 * recipe.cutoff_len)
        if recipe.pretrains:
            self.encode = _encode_pieces
            return
        with template_time("of a conversation that tries it"):
            self.render: Renderer = renderer(
                tokenizer,
                recipe.template,
                recipe.default_system,
                recipe.enable_thinking,
                recipe.mask_history,
            )
        self.control, self.num_control = ControlTokens(tokenizer), 0
        with tokenizer_errors("short texts that try it"):
            self.encode = _encode_pieces if joins_cleanly(tokenizer) else _encode_whole
        if self.encode is _encode_whole and not tokenizer.is_fast:
            what = "This tokenizer does not report the positions of its tokens in the text"
            fix = "use a model folder with a tokenizer.json"
            raise JobError(what, type(tokenizer).__name__, fix)
        if recipe.split_special_tokens and self.encode is _encode_whole:
            what = "split_special_tokens needs a tokenizer whose texts join without a space"
            raise JobError(what, type(tokenizer).__name__, "set split_special_tokens: false")

    def __call__(self, rows: list[RawRow], layout: Layout) -> Chunk:
        """Tokenize a chunk."""
        self.num_control = 0
        kept, unusable = self.rows(rows, layout)
        cut = [(row.where, row.num_before) for row in kept if row.num_before > len(row.ids)]
        return Chunk(
            ids=np.concatenate([row.ids for row in kept] or [np.zeros(0, np.int32)]),
            trained=np.concatenate([row.trained for row in kept] or [np.zeros(0, np.bool_)]),
            lengths=np.array([len(row.ids) for row in kept], dtype=np.int64),
            answer_starts=np.array([row.answer_start for row in kept], dtype=np.int32),
            num_read=len(rows),
            cut=cut,
            num_control=self.num_control,
            unusable=unusable,
        )

    def rows(
        self, rows: list[RawRow], layout: Layout
    ) -> tuple[list[TokenRow], list[tuple[str, str]]]:
        """Tokenize rows; return those that can be trained on, and where the others are, and why."""
        unusable: list[tuple[str, str]] = []
        places, rendered = [], []
        span = f"{rows[0][0]} to {rows[-1][0]}" if rows else "no rows"
        with template_time(span):
            for where, values in rows:
                try:
                    rendered.append(self._pieces(layout, values))
                    places.append(where)
                except UnusableRow as reason:
                    unusable.append((where, str(reason)))
        with tokenizer_errors(span):
            encoded = self.encode(self.tokenizer, rendered)
        kept = []
        for where, tokens in zip(places, encoded, strict=True):
            try:
                kept += (
                    self._split(where, tokens)
                    if self.recipe.pretrains
                    else [self._row(where, tokens)]
                )
            except UnusableRow as reason:
                unusable.append((where, str(reason)))
        return kept, unusable

    def _pieces(self, layout: Layout, values: Any) -> list[Piece]:
        if self.recipe.pretrains:
            end = str(self.tokenizer.eos_token or "")
            return [Piece(layout.text(values), True), Piece(end, True)]
        conversation = layout.conversation(values)
        most = max(MOST_MESSAGES, self.recipe.cutoff_len)
        if (count := len(conversation.messages)) > most:
            raise UnusableRow(f"{count:,} messages, more than {most:,}")
        has_control = self.control.in_text(conversation)
        self.num_control += has_control
        is_split = has_control and self.recipe.split_special_tokens
        shown = self.control.mark(conversation) if is_split else conversation
        pieces = _without_loss(conversation, self.render(shown))
        pieces = self.control.unmark(pieces) if is_split else pieces
        if not any(p.is_answer for p in pieces):
            raise UnusableRow("no answer: the chat template writes none")
        if (size := sum(len(p.text) for p in pieces)) > self.longest:
            raise UnusableRow(f"{size:,} characters, more than {self.longest:,}")
        return pieces

    def _split(self, where: str, tokens: "_Encoded") -> list[TokenRow]:
        """Return a text in rows of cutoff_len tokens."""
        ids, cutoff = (tokens.ids if tokens else np.zeros(0, np.int32)), self.recipe.cutoff_len
        parts = [ids[i : i + cutoff] for i in range(0, len(ids), cutoff)]
        return [TokenRow(where, p, np.ones(len(p), np.bool_), len(p) // 2, len(p)) for p in parts]

    def _row(self, where: str, tokens: "_Encoded") -> TokenRow:
        if tokens is None:
            raise UnusableRow(_SPANS_BOTH)
        cutoff, num_before = self.recipe.cutoff_len, len(tokens.ids)
        if num_before > cutoff:
            stay = picked(tokens.is_answer, cutoff, last_first=self.recipe.mask_history)
            tokens = _Tokens(tokens.ids[stay], tokens.is_answer[stay])
        answer_start = _last_run(tokens.is_answer)
        trained = tokens.is_answer
        if self.recipe.train_on_prompt:
            trained = np.ones(len(tokens.ids), dtype=np.bool_)
        elif self.recipe.mask_history:
            trained = trained & (np.arange(len(trained)) >= answer_start)
        if not trained[1:].any():
            reason = f"within cutoff_len ({cutoff}) there is no room for an answer"
            raise UnusableRow(f"{reason}: the row has {plural(num_before, 'token')}")
        return TokenRow(where, tokens.ids, trained, answer_start, num_before)


def _without_loss(conversation: Conversation, pieces: list[Piece]) -> list[Piece]:
    """Return the pieces; answers with loss_weight 0 are not answers."""
    answers = [m for m in conversation.messages if m["role"] == "assistant"]
    silent = {number for number, m in enumerate(answers) if m.get("loss_weight") == 0}
    if not silent:
        return pieces
    if len(silent) == len(answers):
        raise UnusableRow("no answer is trained: the loss_weight of each is 0")
    if len(answers) != sum(piece.is_answer for piece in pieces):
        raise UnusableRow("the answer with loss_weight 0 touches another one")
    numbers = count()
    return [replace(p, is_answer=p.is_answer and next(numbers) not in silent) for p in pieces]


def _last_run(is_answer: NDArray[np.bool_]) -> int:
    """Return where the last answer begins; the length if there is none."""
    starts = np.flatnonzero(np.diff(is_answer, prepend=False) & is_answer)
    return int(starts[-1]) if len(starts) else len(is_answer)


@dataclass(frozen=True, slots=True)
class _Tokens:
    ids: NDArray[np.int32]
    is_answer: NDArray[np.bool_]


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


def _batch_encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], offsets: bool, **options: bool
) -> Any:
    """Tokenize texts, in parallel threads of the tokenizer's own."""
    options |= {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    return tokenizer(texts, add_special_tokens=False, return_offsets_mapping=offsets, **options)


def _encode_pieces(
    tokenizer: PreTrainedTokenizerBase, rendered: list[list[Piece]]
) -> list[_Encoded]:
    """Tokenize prompts and answers separately, as in generation."""
    every = [piece for pieces in rendered for piece in pieces]
    found = {}
    for plain in {piece.is_plain for piece in every}:
        texts = [piece.text for piece in every if piece.is_plain == plain]
        options = {"split_special_tokens": True} if plain else {}
        found[plain] = iter(_batch_encode(tokenizer, texts, False, **options)["input_ids"])
    ids = (next(found[piece.is_plain]) for piece in every)
    encoded: list[_Encoded] = []
    for pieces in rendered:
        parts = [next(ids) for _ in pieces]
        lengths = [len(part) for part in parts]
        tokens = np.fromiter(chain.from_iterable(parts), dtype=np.int32, count=sum(lengths))
        is_answer = np.repeat([piece.is_answer for piece in pieces], lengths)
        encoded.append(_Tokens(tokens, is_answer))
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
        is_answer = np.array([piece.is_answer for piece in pieces])[piece_of]
        encoded.append(_Tokens(np.array(ids, dtype=np.int32), is_answer))
    return encoded


def _first_prompt(pieces: Iterable[Piece]) -> str:
    """Return the text before the first answer."""
    return "".join(piece.text for piece in takewhile(lambda piece: not piece.is_answer, pieces))


def reasons(unusable: list[tuple[str, str]]) -> dict[str, int]:
    """Count unusable rows by reason, numbers in the reasons left out."""
    return dict(Counter("".join("#" if c.isdigit() else c for c in why) for _, why in unusable))


def picked(is_answer: NDArray[np.bool_], cutoff: int, last_first: bool) -> NDArray[np.int64]:
    """Return the indices of the tokens that stay.

    Turn by turn, prompt and answer are shortened at their ends, in proportion if both are long, so
    that a long prompt does not cost the answer; turns for which there is no room are left out.
    `last_first` begins with the last turn, for losses on it alone.

    Source: infer_seqlen and SupervisedDatasetProcessor in LLaMA-Factory 0.9.6
    (src/llamafactory/data/processor).
    """
    left, kept = cutoff, []
    turns = _turns(is_answer)
    for start, answer, end in reversed(turns) if last_first else turns:
        if left <= 0:
            break
        prompt_len, answer_len = _shares(answer - start, end - answer, left)
        kept.append(np.arange(start, start + prompt_len))
        kept.append(np.arange(answer, answer + answer_len))
        left -= prompt_len + answer_len
    return np.sort(np.concatenate(kept))


def _turns(is_answer: NDArray[np.bool_]) -> list[tuple[int, int, int]]:
    """Return where each prompt starts, and its answer starts and ends."""
    borders = [0, *(np.flatnonzero(np.diff(is_answer)) + 1).tolist(), len(is_answer)]
    if is_answer[0]:
        borders.insert(0, 0)
    if len(borders) % 2 == 0:  # something follows the last answer
        borders.append(len(is_answer))
    return list(zip(borders[::2], borders[1::2], borders[2::2], strict=False))


def _shares(prompt: int, answer: int, room: int) -> tuple[int, int]:
    """Return how much of a prompt and of its answer fits."""
    if answer * 2 < room:
        most = room
    elif prompt * 2 < room:
        most = room - prompt
    else:
        most = int(room * (answer / (prompt + answer)))
    answer = min(most, answer)
    return min(room - answer, prompt), answer
