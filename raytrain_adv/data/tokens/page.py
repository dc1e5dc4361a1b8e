"""A conversation written with a chat template, and the answers in it."""

import re
from copy import copy
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from raytrain_adv.data.read.formats import Message, UnusableRow


@dataclass(frozen=True)
class Piece:
    """A stretch of the rendered conversation."""

    text: str
    is_answer: bool
    is_plain: bool = False
    """Whether it has the letters of a control token, and is none."""


Span = tuple[int, int]
"""Where an answer starts and ends in the text."""
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CANNOT_WRITE = (
    *(jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, NameError),
    *(ArithmeticError, RecursionError, MemoryError),
)
"""What a chat template raises on a conversation that its author did not think of, or wherever it
would take all memory. OverflowError, an ArithmeticError, is also the sandbox's refusal.
"""


class Page:
    """Writes messages with one chat template."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str,
        tools: list[Any] | None = None,
        thinks: bool | None = None,
    ) -> None:
        self.chat_template, self.tools = chat_template, tools
        self.has_parts = False
        self.given: dict[str, Any] = dict(tokenizer.special_tokens_map)
        if thinks is not None:
            self.given["enable_thinking"] = thinks

    def with_parts(self) -> "Page":
        """Return a page that gives texts to the template as lists of one part."""
        page = copy(self)
        page.has_parts = True
        return page

    def write(self, messages: list[Message], asks: bool = False) -> str:
        """Return the text; with the beginning of an answer at its end if `asks`."""
        return self._render(messages, asks, marked=False)[0]

    def marked(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """Return the text, and each answer that the template marks."""
        return self._render(messages, asks=False, marked=True)

    def _render(self, messages: list[Message], asks: bool, marked: bool) -> tuple[str, list[Span]]:
        """Return the text and the answers. Raises UnusableRow if the template refuses the messages,
        or fails on them.
        """
        if self.has_parts:
            messages = [_in_parts(message) for message in messages]
        try:
            rendered: Any = render_jinja_template(
                conversations=[messages],
                tools=self.tools,
                chat_template=self.chat_template,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=asks,
                **self.given,
            )
        except _CANNOT_WRITE as error:
            why = str(error) or type(error).__name__
            raise UnusableRow(f"the chat template refuses it: {why}") from error
        texts, spans = rendered
        return texts[0], spans[0] if marked else []


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def with_system(messages: list[Message], default_system: str | None) -> list[Message]:
    """Return the messages, with the default system message if they have none."""
    if default_system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": default_system}, *messages]


def in_pieces(text: str, spans: list[Span]) -> list[Piece]:
    """Split a text into answers and what is between them; answers that touch become one."""
    found: list[Piece] = []
    at = 0
    for start, end in spans:
        if start == at and found:
            found[-1] = Piece(found[-1].text + text[start:end], True)
        else:
            found += [Piece(text[at:start], False), Piece(text[start:end], True)]
        at = end
    return [piece for piece in (*found, Piece(text[at:], False)) if piece.text]
