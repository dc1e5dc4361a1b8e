"""From a conversation to stretches of text that are, or are not, the assistant's."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from raytrain_adv.data.read.formats import Conversation, Message, UnusableRow
from raytrain_adv.data.tokens.templates import find_template
from raytrain_adv.errors import JobError


@dataclass(frozen=True)
class Piece:
    """A stretch of the rendered conversation."""

    text: str
    is_answer: bool


Renderer = Callable[[Conversation], list[Piece]]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def renderer(
    tokenizer: PreTrainedTokenizerBase, template: str | None, default_system: str | None
) -> Renderer:
    """Return the function that renders conversations with a template; None: the tokenizer's own.

    `default_system` is the system message of conversations without one; None: the template's.
    """
    if template is not None:
        source, whose = find_template(template).source, f"template {template}"
        split: Callable[[_Page, list[Message]], list[Piece]] = _split_by_messages
    else:
        source, whose = _own_template(tokenizer), "the tokenizer's chat template"
        split = _split_by_marks if _GENERATION.search(source) else _split_by_prefixes

    def render(conversation: Conversation) -> list[Piece]:
        messages = conversation.messages
        if default_system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": default_system}, *messages]
        _refuse_dropped(conversation, source, whose)
        try:
            return split(_Page(tokenizer, source, conversation.tools), messages)
        except jinja2.TemplateError as error:
            raise UnusableRow(f"{whose} refuses it: {error}") from error

    return render


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several templates by name, as some model folders have them
        template = template.get("default")
    if not isinstance(template, str):
        what = "The tokenizer has no default chat template"
        raise JobError(what, str(template)[:80], "set template in the job")
    return template


def _refuse_dropped(conversation: Conversation, source: str, whose: str) -> None:
    """Refuse what a chat template that does not mention it would silently drop."""
    messages = conversation.messages
    for present, word, what in (
        (bool(conversation.tools), "tools", "tools"),
        (any("tool_calls" in m for m in messages), "tool_calls", "function calls"),
        (any(m["role"] == "tool" for m in messages), "tool", "the results of function calls"),
    ):
        if present and word not in source:
            raise UnusableRow(f"{whose} has no form for {what}")


class _Page:
    """Writes messages with one chat template."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_template: str, tools: list[Any] | None
    ) -> None:
        self.chat_template, self.tools = chat_template, tools
        self.special: dict[str, Any] = dict(tokenizer.special_tokens_map)

    def write(self, messages: list[Message], asks: bool = False) -> str:
        """Return the text; with the beginning of an answer at its end if `asks`."""
        return self.render(messages, asks, marked=False)[0]

    def render(
        self, messages: list[Message], asks: bool = False, marked: bool = True
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and each answer's start and end in it if the template marks them."""
        rendered: Any = render_jinja_template(
            conversations=[messages],
            tools=self.tools,
            chat_template=self.chat_template,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=asks,
            **self.special,
        )
        texts, spans = rendered
        return texts[0], spans[0] if marked else []


def _split_by_messages(page: _Page, messages: list[Message]) -> list[Piece]:
    """Split where the text of one more message begins, for templates that never rewrite any."""
    pieces, at = [], 0
    for turn, message in enumerate(messages, 1):
        if message["role"] != "system":
            text = page.write(messages[:turn])
            pieces.append(Piece(text[at:], message["role"] == "assistant"))
            at = len(text)
    return pieces


def _split_by_marks(page: _Page, messages: list[Message]) -> list[Piece]:
    """Split where the template's generation blocks begin and end.

    What the template puts after the last answer, if it also stands after an earlier one, is the end
    of a turn that the marks leave out; the model has to learn it too.
    """
    text, spans = page.render(messages)
    ending = text[spans[-1][1] :] if spans else ""
    pieces, at = [], 0
    for start, end in spans:
        if text.startswith(ending, end):
            end += len(ending)
        pieces += [Piece(text[at:start], False), Piece(text[start:end], True)]
        at = end
    return [p for p in (*pieces, Piece(text[at:], False)) if p.text]


def _split_by_prefixes(page: _Page, messages: list[Message]) -> list[Piece]:
    """Split where the texts up to an answer's start and end, each rendered alone, stop."""
    text = page.write(messages)
    pieces, at = [], 0
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = page.write(messages[:turn], asks=True)
        if not text.startswith(prompt) or len(prompt) < at:
            raise _inconsistent(text, prompt)
        end = len(text)
        if turn < len(messages) - 1:
            end = _end_of_answer(page, text, prompt, messages[: turn + 1])
        pieces += [Piece(text[at : len(prompt)], False), Piece(text[len(prompt) : end], True)]
        at = end
    return [p for p in pieces if p.text]


def _end_of_answer(page: _Page, text: str, prompt: str, messages: list[Message]) -> int:
    """Find where an earlier answer ends.

    Templates of reasoning models write the newest answer differently from earlier ones; then the
    end is what follows the answer's own words.
    """
    until = page.write(messages)
    if text.startswith(until):
        return len(until)
    words = messages[-1]["content"].strip()
    _, found, tail = until.rpartition(words)
    start = text.find(words, len(prompt))
    if not words or not found or start < 0 or not text.startswith(tail, start + len(words)):
        raise _inconsistent(text, until)
    return start + len(words) + len(tail)


def _inconsistent(text: str, prefix: str) -> JobError:
    pairs = zip(text, prefix, strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return JobError(
        "The tokenizer's chat template writes answers that cannot be separated from the prompts",
        f"a conversation begins {text[max(0, same - 40) : same + 40]!r}\n"
        f"but its beginning alone  {prefix[max(0, same - 40) : same + 40]!r}",
        "set template in the job, or mark the answers with {% generation %} in the chat template",
    )
