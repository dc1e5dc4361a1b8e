"""Rendering with the tokenizer's own chat template: what it can write, and where answers lie."""

import json
import re
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from raytrain_adv.data.read.formats import Conversation, Message, UnusableRow
from raytrain_adv.data.tokens.page import GENERATION, Page, Piece, Span, in_pieces, with_system
from raytrain_adv.data.tokens.spans import Difference, split_by_prefixes
from raytrain_adv.data.tokens.thoughts import (
    THOUGHT_FORMS,
    ThoughtForm,
    beside,
    in_text,
    split_thought,
    with_none,
    writes_thought,
)

_TOOL = {
    "type": "function",
    "function": {
        "name": "first_name",
        "description": "a description",
        "parameters": {"type": "object", "properties": {"a_key": {"type": "string"}}},
    },
}
_TRIED = "a thought"
_ASK: Message = {"role": "user", "content": "a question"}
_ANSWER: Message = {"role": "assistant", "content": "an answer"}
_NO_TOOLS = "the tokenizer's chat template has no form for tools; set template in the job"


class CallForm(NamedTuple):
    """How a template wants function calls."""

    as_text: bool = False
    """Arguments as JSON text."""
    no_content: bool = False
    """A call's message has no content, rather than an empty one."""
    named_ids: bool = False
    """Ids have the name of the function."""


CALL_FORMS = tuple(
    CallForm(as_text, no_content, named_ids)
    for named_ids in (False, True)
    for no_content in (False, True)
    for as_text in (False, True)
)


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
        self._refuse_lost_thought(conversation.messages[-1], text)
        self._refuse_lost_system(messages)
        if self.is_marked:
            spans = _with_endings(text, spans)
        if self._answers_end_bare:
            text, spans = self._with_ends_of_turn(page, messages, text, spans)
        return in_pieces(text, spans)

    def _page(self, tools: list[Any] | None = None) -> Page:
        page = Page(self.tokenizer, self.source, tools, self.thinks)
        return page.with_parts() if self._takes_parts else page

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
            raise UnusableRow(_NO_TOOLS)
        made: list[Message] = []
        calls: list[dict[str, Any]] = []
        num_calls = 0
        for message in messages:
            if message.get("tool_calls"):
                message = self._with_calls(message, num_calls)
                calls = message["tool_calls"]
                num_calls += len(calls)
            elif message["role"] == "tool":
                number = sum(1 for _ in takewhile(lambda m: m["role"] == "tool", reversed(made)))
                message = _answering(message, calls, number)
                if not self._writes_results:
                    what = "the results of function calls"
                    raise UnusableRow(f"the tokenizer's chat template has no form for {what}")
            made.append(self._with_thought(message) if message["role"] == "assistant" else message)
        return made

    def _with_calls(self, message: Message, num_before: int) -> Message:
        calls = message["tool_calls"]
        if self._call_form is None or (len(calls) > 1 and not self._writes_several):
            what = "function calls" if self._call_form is None else "several calls at once"
            raise UnusableRow(f"the tokenizer's chat template has no form for {what}")
        thought, content = split_thought(message)
        is_lost = thought and self.thinks is not False and self._called_thought_form is None
        if is_lost or (content.strip() and not self._writes_text_beside_calls):
            raise UnusableRow("the tokenizer's chat template writes no text before function calls")
        return _dressed(message, self._call_form, num_before)

    def _with_thought(self, message: Message) -> Message:
        """Return an answer with its thoughts where this template looks for them; where it looks for
        none it drops them.
        """
        thought, content = split_thought(message)
        form = self._called_thought_form if message.get("tool_calls") else self._thought_form
        if self.thinks is False or (not thought and form is not in_text):
            return with_none(message)
        if not thought:
            return message
        return (form or beside)(message, thought, content)

    def _refuse_lost_thought(self, last: Message, text: str) -> None:
        """Refuse a row whose last answer's thoughts the template removes."""
        thought = split_thought(last)[0].strip()
        if thought and thought not in text and self.thinks is not False:
            why = "the tokenizer's chat template removes the thoughts of the last answer"
            keeps = "a template of the model's family, if there is one to set by name, keeps them"
            raise UnusableRow(f"{why}; {keeps}; enable_thinking: false trains without")

    def _refuse_lost_system(self, messages: list[Message]) -> None:
        """Refuse a system message that the template drops: Mistral's write it only where the last
        message is a question.
        """
        first = messages[0]
        has_system = first["role"] == "system" and (first["content"] or "").strip()
        if has_system and not self._writes_system:
            why = "the tokenizer's chat template drops the system message of an answered question"
            raise UnusableRow(f"{why}; the template of the model's family, set by name, keeps it")

    def _written(self, messages: list[Message], tools: list[Any] | None = None) -> str:
        try:
            return self._page(tools).write(messages)
        except UnusableRow:
            return ""

    def _probe(
        self,
        form: CallForm,
        calls: int = 1,
        text: str = "",
        has_results: bool = True,
        thinking: ThoughtForm | None = None,
    ) -> str:
        """Render a conversation with function calls and their results."""
        names = ["first_name", "second_name"][:calls]
        called = [
            {"type": "function", "function": {"name": name, "arguments": {"a_key": "a_value"}}}
            for name in names
        ]
        asking = _dressed({"role": "assistant", "content": text, "tool_calls": called}, form, 0)
        if thinking is not None:
            asking = thinking({**asking, "reasoning_content": _TRIED}, _TRIED, "")
        results = [
            _answering({"role": "tool", "content": f"result {n}"}, asking["tool_calls"], n)
            for n in range(calls)
        ]
        after = [*results, _ANSWER] if has_results else []
        return self._written([_ASK, asking, *after], [_TOOL] if self._writes_tools else None)

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template writes text only as a list of parts, as those of image models do.

        They iterate over the letters of a plain text, and write none.
        """
        page = Page(self.tokenizer, self.source, None, self.thinks)
        found = []
        for tried in (page, page.with_parts()):
            try:
                text = tried.write([_ASK, _ANSWER])
            except UnusableRow:
                text = ""
            found.append("a question" in text and "an answer" in text)
        return found == [False, True]

    @cached_property
    def _writes_system(self) -> bool:
        system: Message = {"role": "system", "content": "a system text"}
        return "a system text" in self._written([system, _ASK, _ANSWER])

    @cached_property
    def _writes_tools(self) -> bool:
        return "first_name" in self._written([_ASK, _ANSWER], [_TOOL])

    @cached_property
    def _call_form(self) -> CallForm | None:
        """The form in which the template writes a call's name and arguments; None: there is none.

        A conversation that ends with the call shows it: a result may repeat the name.
        """
        described = 1 if self._writes_tools else 0
        for form in CALL_FORMS:
            text = self._probe(form, has_results=False) or self._probe(form)
            if text.count("first_name") > described and "a_value" in text and "\\" not in text:
                return form
        return None

    @cached_property
    def _writes_several(self) -> bool:
        text = self._probe(self._call_form or CALL_FORMS[0], calls=2)
        return "second_name" in text and "result 1" in text

    @cached_property
    def _writes_text_beside_calls(self) -> bool:
        text = self._probe(self._call_form or CALL_FORMS[0], text="some text")
        return "some text" in text.partition("result 0")[0]  # Gemma 4 writes it after the results

    @cached_property
    def _writes_results(self) -> bool:
        return "result 0" in self._probe(self._call_form or CALL_FORMS[0])

    @cached_property
    def _thought_form(self) -> ThoughtForm | None:
        """The form in which the template writes the thoughts of an answer; None: there is none.

        Tags in the text are none where thoughts before calls have other marks: Gemma 4's.
        """
        called = self._probe(self._call_form or CALL_FORMS[0], thinking=beside)
        has_own_marks = _TRIED in called and "<think>" not in called
        answer = {**_ANSWER, "reasoning_content": _TRIED}
        for form in THOUGHT_FORMS:
            text = self._written([_ASK, form(answer, _TRIED, "an answer")]).rpartition("a question")
            is_other = has_own_marks and form not in (THOUGHT_FORMS[:2])
            if not is_other and "an answer" in text[2] and writes_thought(form, text[2], _TRIED):
                return form
        return None

    @cached_property
    def _called_thought_form(self) -> ThoughtForm | None:
        """The form in which the template writes the thoughts before calls; None: there is none."""
        for form in THOUGHT_FORMS:
            text = self._probe(self._call_form or CALL_FORMS[0], thinking=form)
            text = text.rpartition("a question")[2].partition("result 0")[0]
            if writes_thought(form, text, _TRIED):
                return form
        return None

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
        text = self._written([_ASK, _ANSWER])
        tail = text.rpartition("an answer")[2] if "an answer" in text else ""
        return bool(text) and self._special.search(tail) is None

    def _with_ends_of_turn(
        self, page: Page, messages: list[Message], text: str, spans: list[Span]
    ) -> tuple[str, list[Span]]:
        """End each answer with the token that begins the next message, the last with eos, or with
        the token that begins the results of its calls.
        """
        ended: list[Span] = []
        for start, end in spans[:-1]:
            after = self._special.match(text, end)
            ended.append((start, after.end() if after else end))
        eos = str(self.tokenizer.eos_token or "")
        for start, end in spans[-1:]:
            text = text[:end] + (self._result_token(page, messages, text[:end]) or eos)
            ended.append((start, len(text)))
        return text, ended

    def _result_token(self, page: Page, messages: list[Message], text: str) -> str:
        """Return the token after calls at the end of a conversation; empty without calls."""
        if not messages[-1].get("tool_calls"):
            return ""
        result = _answering({"role": "tool", "content": ""}, messages[-1]["tool_calls"], 0)
        try:
            longer = page.write([*messages, result])
        except UnusableRow:
            return ""
        token = self._special.match(longer, len(text)) if longer.startswith(text) else None
        return token[0] if token else ""


def _dressed(message: Message, form: CallForm, num_before: int) -> Message:
    """Return a message with calls in the form that a template wants, with ids.

    `num_before` calls stand in earlier messages.
    """
    calls = []
    for number, call in enumerate(message["tool_calls"], num_before):
        function = call["function"]
        # Mistral's chat templates insist on ids of nine digits, Kimi K2's write only the id.
        name = f"functions.{function['name']}:{number}" if form.named_ids else f"{number:09d}"
        if form.as_text:
            text = json.dumps(function["arguments"], ensure_ascii=False)
            function = {**function, "arguments": text}
        calls.append({**call, "id": name, "function": function})
    content = message["content"] or (None if form.no_content else "")
    return {**message, "content": content, "tool_calls": calls}


def _answering(result: Message, calls: list[dict[str, Any]], number: int) -> Message:
    """Return the result with the name and id of the call that it answers."""
    number = result.get("call", number)
    call: dict[str, Any] = (
        calls[number] if number < len(calls) else {"id": f"{number:09d}", "function": {}}
    )
    name = call["function"].get("name", "tool")
    kept = {key: value for key, value in result.items() if key != "call"}
    return {**kept, "name": name, "tool_call_id": call["id"]}


def _with_endings(text: str, spans: list[Span]) -> list[Span]:
    """Lengthen marked answers by the end of a turn that the marks leave out.

    It is what the template puts after the last answer, if it also stands after an earlier one.
    """
    ending = text[spans[-1][1] :] if spans else ""
    after = [start for start, _ in spans[1:]] + [len(text)]
    ends = [e + len(ending) if text.startswith(ending, e) else e for _, e in spans]
    return [(s, min(e, most)) for (s, _), e, most in zip(spans, ends, after, strict=True)]
