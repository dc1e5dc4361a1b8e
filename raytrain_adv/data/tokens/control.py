"""Control tokens inside the text of conversations, such as <|im_end|> in a user's message."""

import re
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from raytrain_adv.data.read.formats import Conversation
from raytrain_adv.data.tokens.page import Piece

FIRST_MARK = 0xF0000  # of 65,534 characters for private use, which no text of a language has


class ControlTokens:
    """Finds the tokenizer's control tokens in messages, and keeps them text: between `mark` and
    `unmark` each is one character, so that chat templates and tokenizers see none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = tokenizer.added_tokens_decoder.values()
        names = {token.content for token in added if token.special and token.content.strip()}
        longest_first = sorted(names, key=lambda name: (-len(name), name))
        self._marks = {name: chr(FIRST_MARK + n) for n, name in enumerate(longest_first)}
        self._names = {mark: name for name, mark in self._marks.items()}
        last = chr(FIRST_MARK + max(len(names), 1) - 1)
        self._marked = re.compile(f"([{chr(FIRST_MARK)}-{last}])")
        either = "|".join(map(re.escape, longest_first))
        self._found = re.compile(either or r"(?!)")

    def in_text(self, conversation: Conversation) -> bool:
        """Return whether a message contains one."""
        return any(self._found.search(text) for text in _texts(conversation.messages))

    def mark(self, conversation: Conversation) -> Conversation:
        """Return the conversation with each replaced by a character."""
        return replace(conversation, messages=_mapped(conversation.messages, self._mark))

    def _mark(self, text: str) -> str:
        return self._found.sub(lambda match: self._marks[match[0]], text)

    def unmark(self, pieces: list[Piece]) -> list[Piece]:
        """Return the pieces with each as a piece of plain text."""
        parts = [(p, part) for p in pieces for part in self._marked.split(p.text) if part]
        return [
            Piece(self._names.get(part, part), p.is_answer, is_plain=part in self._names)
            for p, part in parts
        ]


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for one in inner for text in _texts(one)]


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(one, change) for key, one in value.items()}
    return [_mapped(one, change) for one in value] if isinstance(value, list) else value
