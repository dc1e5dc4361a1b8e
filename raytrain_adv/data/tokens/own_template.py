"""Rendering with the tokenizer's own chat template: what it can write, and where answers lie."""

import json
import re
from functools import cached_property
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from raytrain_adv.data.read.formats import Conversation, Message, UnusableRow
from raytrain_adv.data.tokens.page import GENERATION, Page, Piece, Span, pieces, with_system
from raytrain_adv.data.tokens.spans import Difference, split_by_prefixes

_TOOL = {
    "type": "function",
    "function": {
        "name": "first_name",
        "description": "a description",
        "parameters": {"type": "object", "properties": {"a_key": {"type": "string"}}},
    },
}
_ASK: Message = {"role": "user", "content": "a question"}
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


class OwnTemplate:
    """Renders conversations with the tokenizer's chat template.

    What the template can write, and in which form it wants it, is found by small conversations that
    it renders before the first row.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        default_system: str | None,
        thinks: bool | None,
    ) -> None:
        self.tokenizer, self.source = tokenizer, source
        self.default_system, self.thinks = default_system, thinks
        self.is_marked = GENERATION.search(source) is not None

    def __call__(self, conversation: Conversation) -> list[Piece]:
        """Return the pieces of a conversation. Raises UnusableRow if the template cannot write all
        of it, or answers cannot be separated.
        """
        messages = with_system(conversation.messages, self.default_system)
        messages = self._as_it_wants(messages, conversation.tools)
        page = self._page(conversation.tools)
        text, spans = page.marked(messages) if self.is_marked else self._find(page, messages)
        self._refuse_lost_thought(messages, text)
        if self.is_marked:
            spans = _with_endings(text, spans)
        if self._answers_end_bare:
            text, spans = self._with_ends_of_turn(text, spans)
        return pieces(text, spans)

    def _page(self, tools: list[Any] | None = None) -> Page:
        return Page(self.tokenizer, self.source, tools, self.thinks)

    def _find(self, page: Page, messages: list[Message]) -> tuple[str, list[Span]]:
        text = page.write(messages)
        spans = split_by_prefixes(page, messages, text)
        if spans is None:
            spans = Difference(page, self.tokenizer, messages, text).answers()
        return text, spans

    # What the template can write.

    def _as_it_wants(self, messages: list[Message], tools: list[Any] | None) -> list[Message]:
        """Return the messages in the form that this template writes completely."""
        if tools and not self._writes_tools:
            raise UnusableRow("the tokenizer's chat template has no form for tools")
        made: list[Message] = []
        names: list[str] = []
        for message in messages:
            if calls := message.get("tool_calls"):
                message = self._with_calls(message, len(made))
                names = [call["function"]["name"] for call in calls]
            elif message["role"] == "tool":
                number = sum(1 for _ in takewhile(lambda m: m["role"] == "tool", reversed(made)))
                name = names[number] if number < len(names) else "tool"
                at = len(made) - number - 1
                message = {**message, "name": name, "tool_call_id": _call_id(at, number)}
                if not self._writes_results:
                    what = "the results of function calls"
                    raise UnusableRow(f"the tokenizer's chat template has no form for {what}")
            made.append(self._with_thought(message) if message["role"] == "assistant" else message)
        return made

    def _with_calls(self, message: Message, at: int) -> Message:
        calls = message["tool_calls"]
        if self._call_form is None or (len(calls) > 1 and not self._writes_several):
            what = "function calls" if self._call_form is None else "several calls at once"
            raise UnusableRow(f"the tokenizer's chat template has no form for {what}")
        has_text = message["content"] or (message.get("reasoning_content") and True)
        if self._reads_reasoning and _THOUGHT.fullmatch(message["content"] or "\n"):
            has_text = False
        if has_text and not self._writes_text_beside_calls:
            raise UnusableRow("the tokenizer's chat template drops text beside function calls")
        return _dressed(message, *self._call_form, at)

    def _with_thought(self, message: Message) -> Message:
        """Return an answer with its thoughts where this template looks for them."""
        thought, content = message.get("reasoning_content"), message.get("content") or ""
        if self._reads_reasoning:
            found = None if thought else _THOUGHT.match(content)
            if found:
                rest = content[found.end() :]
                return {**message, "reasoning_content": found[1].strip("\n"), "content": rest}
            return message
        if not thought:
            return message
        content = f"<think>\n{thought}\n</think>\n\n{content}"
        return {
            **{k: v for k, v in message.items() if k != "reasoning_content"},
            "content": content,
        }

    def _refuse_lost_thought(self, messages: list[Message], text: str) -> None:
        """Refuse a row whose last answer's thoughts the template removes."""
        last = messages[-1]
        found = _THOUGHT.match(last.get("content") or "")
        thought = last.get("reasoning_content") or (found[1] if found else "")
        if thought.strip() and thought.strip() not in text and self.thinks is not False:
            why = "the tokenizer's chat template removes the thoughts of the last answer"
            raise UnusableRow(f"{why}; template has forms that keep them, as deepseekr1")

    def _written(self, messages: list[Message], tools: list[Any] | None = None) -> str:
        try:
            return self._page(tools).write(messages)
        except UnusableRow:
            return ""

    def _probe(self, form: tuple[bool, bool], calls: int = 1, text: str = "") -> str:
        """Render a conversation with function calls and their results."""
        names = ["first_name", "second_name"][:calls]
        called = [
            {"type": "function", "function": {"name": name, "arguments": {"a_key": "a_value"}}}
            for name in names
        ]
        asking = _dressed({"role": "assistant", "content": text, "tool_calls": called}, *form, 1)
        results = [
            {"role": "tool", "content": f"result {n}", "name": name, "tool_call_id": _call_id(1, n)}
            for n, name in enumerate(names)
        ]
        answer = {"role": "assistant", "content": "an answer"}
        return self._written(
            [_ASK, asking, *results, answer], [_TOOL] if self._writes_tools else None
        )

    @cached_property
    def _writes_tools(self) -> bool:
        return "first_name" in self._written([_ASK, _says("an answer")], [_TOOL])

    @cached_property
    def _call_form(self) -> tuple[bool, bool] | None:
        """Whether arguments are JSON text, and whether a call's content is none; None: no form."""
        for form in ((False, False), (True, False), (False, True), (True, True)):
            text = self._probe(form)
            described = 1 if self._writes_tools else 0
            if text.count("first_name") > described and "a_value" in text and "\\" not in text:
                return form
        return None

    @cached_property
    def _writes_several(self) -> bool:
        text = self._probe(self._call_form or (False, False), calls=2)
        return "second_name" in text and "result 1" in text

    @cached_property
    def _writes_text_beside_calls(self) -> bool:
        return "some text" in self._probe(self._call_form or (False, False), text="some text")

    @cached_property
    def _writes_results(self) -> bool:
        return "result 0" in self._probe(self._call_form or (False, False))

    @cached_property
    def _reads_reasoning(self) -> bool:
        answer = {**_says("an answer"), "reasoning_content": "a thought"}
        return "a thought" in self._written([_ASK, answer])

    # Where a turn ends.

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """Matches any special token."""
        added = self.tokenizer.added_tokens_decoder.values()
        tokens = {str(token) for token in added if token.special}
        tokens |= {str(token) for token in self.tokenizer.all_special_tokens}
        longest_first = sorted(tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @cached_property
    def _answers_end_bare(self) -> bool:
        """Whether the template ends an answer with no token of its own, as GLM-4.5's does."""
        text = self._written([_ASK, _says("an answer")])
        tail = text.rpartition("an answer")[2] if "an answer" in text else ""
        return bool(text) and self._special.search(tail) is None

    def _with_ends_of_turn(self, text: str, spans: list[Span]) -> tuple[str, list[Span]]:
        """End each answer with the token that begins the next message, the last with eos."""
        ended: list[Span] = []
        for start, end in spans[:-1]:
            after = self._special.match(text, end)
            ended.append((start, after.end() if after else end))
        for start, end in spans[-1:]:
            text = text[:end] + str(self.tokenizer.eos_token or "")
            ended.append((start, len(text)))
        return text, ended


def _says(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _call_id(message: int, number: int) -> str:
    """Return an id of nine digits, which is what Mistral's chat templates insist on."""
    return f"{message:05d}{number:04d}"


def _dressed(message: Message, as_text: bool, no_content: bool, at: int) -> Message:
    """Return a message with calls in the form that a template wants, with ids."""
    calls = []
    for number, call in enumerate(message["tool_calls"]):
        function = call["function"]
        if as_text:
            text = json.dumps(function["arguments"], ensure_ascii=False)
            function = {**function, "arguments": text}
        calls.append({**call, "id": _call_id(at, number), "function": function})
    content = message["content"] or (None if no_content else "")
    return {**message, "content": content, "tool_calls": calls}


def _with_endings(text: str, spans: list[Span]) -> list[Span]:
    """Lengthen marked answers by the end of a turn that the marks leave out.

    It is what the template puts after the last answer, if it also stands after an earlier one.
    """
    ending = text[spans[-1][1] :] if spans else ""
    return [(s, e + len(ending)) if text.startswith(ending, e) else (s, e) for s, e in spans]
