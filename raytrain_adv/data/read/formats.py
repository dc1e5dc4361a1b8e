"""From a row's columns to a conversation: the alpaca, sharegpt and openai layouts."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

from raytrain_adv.data.read.entries import INFO_FILE, Entry, Formatting
from raytrain_adv.errors import JobError
from raytrain_adv.text import parse_json

Message = dict[str, Any]
"""role: system, user, assistant or tool; content: text; of an assistant also tool_calls,
reasoning_content, and loss_weight where it is 0; of a tool, if the row has ids, call and name: the
number of the call that it answers, from 0, and the function's name.
"""


class UnusableRow(Exception):
    """A row that cannot be trained on; the text is the reason."""


@dataclass(frozen=True)
class Conversation:
    """At most one system message, then user (or tool) and assistant in turn."""

    messages: list[Message]
    tools: list[Any] | None = None
    """Function descriptions for the chat template."""


@dataclass(frozen=True)
class Layout:
    """Where a dataset keeps what."""

    formatting: Formatting
    columns: Mapping[str, str]
    """prompt, query, response, history, messages, system, tools -> column"""
    tags: Mapping[str, str]
    """role_tag, content_tag -> key of a message; user_tag, ... -> value of role_tag"""

    def conversation(self, values: Any) -> Conversation:
        """Convert one row. Raises UnusableRow if it has no answer, or is not laid out as the others
        are.
        """
        convert = _from_alpaca if self.formatting == "alpaca" else _from_messages
        return convert(self, _as_object(values))

    def text(self, values: Any) -> str:
        """Return a row's text to pretrain on: prompt and query, as LLaMA-Factory joins them."""
        text = self._question(_as_object(values))
        if not text.strip():
            raise UnusableRow(f"no text: {self.columns['prompt']} is empty or missing")
        return text

    def _question(self, values: dict[str, Any]) -> str:
        columns = [self.columns[one] for one in ("prompt", "query") if one in self.columns]
        return "\n".join(filter(None, (_text(values.get(one), one) for one in columns)))


def _as_object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UnusableRow(f"the row is a {type(row).__name__}, not an object")
    return row


_TAGS: dict[Formatting, dict[str, str]] = {"alpaca": {}}
_TAGS["openai"] = {
    "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
    "observation_tag": "tool", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip
_TAGS["sharegpt"] = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip
_OF_MESSAGES: tuple[Formatting, ...] = ("openai", "sharegpt")
_ROLES = {
    "user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool",
    "system_tag": "system",
}  # fmt: skip
_QUESTION_AND_ANSWER = (
    ("instruction", "output"), ("instruction", "response"), ("prompt", "completion"),
    ("prompt", "response"), ("question", "answer"),
)  # fmt: skip
_SURROGATE = re.compile("[\ud800-\udfff]")
_TEXTS = ("text", "content", "instruction", "prompt")
"""Columns with text to pretrain on."""
_QUERIES = {"instruction": "input"}
"""Column with text -> the one whose text follows it."""
_EXTRA = ("history", "system", "tools")
_WEIGHT_KEYS = ("loss_weight", "weight")
_THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
_BEFORE_CALL = re.compile(r"(\s*<think>.*?</think>\s*)", re.DOTALL)
_CALL_TAGS = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def layout(entry: Entry, sample: list[Any], others: Iterable[Any] = ()) -> Layout:
    """Return an entry's layout; what the entry omits is derived from a sample of its rows. Raises
    JobError if the rows fit no known layout, or neither they nor the `others` have a column that is
    to be read: those with tools may come late.
    """
    rows: list[dict[str, Any]] = [values for values in sample if isinstance(values, dict)]
    found = {column for values in rows for column in values}
    example = {column: value for values in rows for column, value in values.items() if value}
    if entry.formatting is not None and entry.columns is not None:
        chosen = Layout(entry.formatting, entry.columns, _TAGS[entry.formatting])
    else:
        chosen = _guess(entry, found, example)
    meaning = "response" if chosen.formatting == "alpaca" else "messages"
    needed = [chosen.columns.get(meaning) or meaning, *(entry.columns or {}).values()]
    if not found.issuperset(needed):
        found |= {column for values in others if isinstance(values, dict) for column in values}
    if missing := [column for column in dict.fromkeys(needed) if column not in found]:
        raise JobError(
            f"Dataset {entry.name} lacks columns that must be read",
            f"formatting {chosen.formatting}, missing: {', '.join(missing)}; "
            f"columns found: {', '.join(sorted(found)) or 'none'}",
            f"correct formatting and columns in its entry of {INFO_FILE}",
        )
    return replace(chosen, tags={**chosen.tags, **entry.tags})


def text_layout(entry: Entry, sample: list[Any]) -> Layout:
    """Return where an entry's rows have the text to pretrain on. Raises JobError if nowhere."""
    found = {column for values in sample if isinstance(values, dict) for column in values}
    named = (entry.columns or {}).get("prompt")
    column = named or next((one for one in _TEXTS if one in found), None)
    if column not in found:
        raise JobError(
            f"Dataset {entry.name} has no text to pretrain on",
            f"columns found: {', '.join(sorted(found)) or 'none'}",
            f'name its column in {INFO_FILE}: "columns": {{"prompt": "..."}}',
        )
    query = (entry.columns or {}).get("query") if named else _QUERIES.get(str(column))
    return Layout("alpaca", {"prompt": str(column)} | ({"query": query} if query else {}), {})


def _guess(entry: Entry, found: set[str], example: dict[str, Any]) -> Layout:
    extra = dict(zip(_EXTRA, _EXTRA, strict=True))  # only later rows may have them
    alpaca = {"prompt": "instruction", "query": "input", "response": "output", **extra}
    if entry.formatting == "alpaca":
        return Layout("alpaca", alpaca, {})
    messages = next((c for c in ("messages", "conversations", "conversation") if c in found), None)
    del extra["history"]
    columns = {"messages": messages or "conversations", **extra}
    if entry.formatting is not None:
        return Layout(entry.formatting, columns, _TAGS[entry.formatting])
    turns = example.get(messages) if messages else None
    keys = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    for formatting in _OF_MESSAGES:
        tags = _TAGS[formatting]
        if {tags["role_tag"], tags["content_tag"]} <= set(keys):
            return Layout(formatting, columns, tags)
    for prompt, response in _QUESTION_AND_ANSWER:
        if {prompt, response} <= found:
            return Layout("alpaca", {**alpaca, "prompt": prompt, "response": response}, {})
    raise JobError(
        f"The layout of dataset {entry.name} is not known",
        f"columns: {', '.join(sorted(found)) or 'none, the rows are not objects'}",
        "use instruction and output (alpaca), conversations of from and value (sharegpt),\n"
        "or messages of role and content (openai); or name the columns in dataset_info.json",
    )


def _from_alpaca(layout: Layout, values: dict[str, Any]) -> Conversation:
    columns = layout.columns
    messages = _system(columns, values)
    history = values.get(columns["history"]) if "history" in columns else None
    if not isinstance(history, list | None):
        raise UnusableRow(f"history is a {type(history).__name__}, not a list")
    for turn in history or []:
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise UnusableRow(f"history contains {turn!r:.60}, not a pair of question and answer")
        messages.append({"role": "user", "content": _text(turn[0], "history")})
        messages.append({"role": "assistant", "content": _text(turn[1], "history")})
    if not (question := layout._question(values)):
        raise UnusableRow("the question is empty")
    answer = _text(values.get(columns["response"]), columns["response"])
    if not answer.strip():
        raise UnusableRow(f"no answer: {columns['response']} is empty or missing")
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(messages, _tools(columns, values))


def _from_messages(layout: Layout, values: dict[str, Any]) -> Conversation:
    columns, tags = layout.columns, layout.tags
    turns = values.get(columns["messages"])
    if not isinstance(turns, list) or not turns:
        raise UnusableRow(f"no answer: {columns['messages']} is empty or missing")
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise UnusableRow(f"message {number} is a {type(turn).__name__}, not an object")
        messages.append(_message(tags, turn, number))
    messages = _with_results_in_order(messages, turns)
    if messages[0]["role"] == "system" and not messages[0]["content"]:
        del messages[0]  # the template's default system message is used
    if messages and messages[0]["role"] != "system":
        messages = _system(columns, values) + messages
    _check_turns(messages)
    return Conversation(messages, _tools(columns, values))


def _message(tags: Mapping[str, str], turn: dict[str, Any], number: int) -> Message:
    role, content = turn.get(tags["role_tag"]), turn.get(tags["content_tag"])
    name = f"message {number}"
    if role == tags["function_tag"]:
        return _function_call(_text(content, name) if not _is_call(content) else content, number)
    known = {tags[tag]: name for tag, name in _ROLES.items()}
    if not isinstance(role, str) or role not in known:
        names = ", ".join(known)
        raise UnusableRow(f"{name} has the unknown role {role!r}; known: {names}")
    message: Message = {"role": known[role], **_parts(content, name)}
    if called := turn.get("tool_calls") or turn.get("function_call"):  # OpenAI's older key
        message["tool_calls"] = _calls(called, number)
    if message["role"] == "assistant":
        thought = next((turn[key] for key in _THOUGHT_KEYS if turn.get(key)), None)
        if thought is not None:
            message["reasoning_content"] = _text(thought, name)
    for key in _WEIGHT_KEYS:
        weight = _weight(turn.get(key), f"{name} has {key}")
        if message["role"] == "assistant":
            message |= weight
        elif turn.get(key) and not weight:
            text = f"{name} is not an answer and has {key} 1: answers alone are trained"
            raise UnusableRow(f"{text}; make it 0 (train_on_prompt: true trains all messages)")
    return message


def _with_results_in_order(messages: list[Message], turns: list[dict[str, Any]]) -> list[Message]:
    """Return the messages, the results of several calls in the order of the calls, if they have the
    ids of those: most chat templates write results without.
    """
    found: list[Message] = []
    calls: list[dict[str, Any]] = []
    ids: list[Any] = []
    for message, turn in zip(messages, turns, strict=True):
        answers = turn.get("tool_call_id")
        if message["role"] != "tool":
            calls = message.get("tool_calls") or []
            ids = [call.get("id") for call in _parsed_calls(turn.get("tool_calls") or [])]
        elif answers is not None and ids.count(answers) == 1:
            number = ids.index(answers)
            message = {**message, "call": number, "name": calls[number]["function"]["name"]}
        found.append(message)
    by_number = itemgetter("call")
    runs = groupby(found, key=lambda message: "call" in message)
    return [m for known, run in runs for m in (sorted(run, key=by_number) if known else run)]


def _is_call(content: Any) -> bool:
    """Whether a call is given as objects, not as text."""
    calls = content if isinstance(content, list) else [content]
    return all(isinstance(call, dict) and "type" not in call for call in calls)


def _weight(weight: Any, name: str) -> dict[str, Any]:
    """Return loss_weight if it is 0; answers have it in LLaMA-Factory's newer data, and OpenAI's as
    weight.
    """
    if weight in (None, 1):
        return {}
    if weight != 0:
        raise UnusableRow(f"{name} {weight!r}; only 0 and 1 are possible")
    return {"loss_weight": 0}


def _parts(content: Any, name: str) -> dict[str, Any]:
    """Return a message's content, and what parts of other types add to it."""
    if not isinstance(content, list):
        return {"content": _text(content, name)}
    kinds: dict[str, list[Any]] = {"text": [], "reasoning": [], "tool_call": []}
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind not in kinds:
            raise UnusableRow(f"{name} has a part of type {kind!r}; only text is read")
        value = part.get("text", part.get("value"))
        if not isinstance(value, str) and kind != "tool_call":
            raise UnusableRow(f"{name} has a part without text")
        kinds[kind].append(value)
    found: dict[str, Any] = {"content": "".join(_text(text, name) for text in kinds["text"])}
    if kinds["reasoning"]:
        found["reasoning_content"] = "".join(_text(text, name) for text in kinds["reasoning"])
    if kinds["tool_call"]:
        calls = [_parsed_calls(value) for value in kinds["tool_call"]]
        number = int(name.split()[-1])
        found["tool_calls"] = _calls([call for several in calls for call in several], number)
    return found


def _function_call(content: Any, number: int) -> Message:
    """Return a message that calls functions; thoughts may stand before the JSON."""
    thought = ""
    if isinstance(content, str):
        found = _BEFORE_CALL.match(content)
        thought, content = (found[1], content[found.end() :]) if found else ("", content)
        content = (
            "[" + ",".join(_CALL_TAGS.findall(content)) + "]"
            if "<tool_call>" in content
            else content
        )
    return {"role": "assistant", "content": thought, "tool_calls": _calls(content, number)}


def _calls(content: Any, number: int) -> list[dict[str, Any]]:
    try:
        inner = [call.get("function", call) for call in _parsed_calls(content)]
        functions = [
            {"name": c["name"], "arguments": _arguments(c.get("arguments", c.get("parameters")))}
            for c in inner
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"message {number} is not a function call with a name and arguments"
        raise UnusableRow(reason) from error
    return [{"type": "function", "function": function} for function in functions]


def _parsed_calls(content: Any) -> list[Any]:
    calls = _parsed(content)
    return calls if isinstance(calls, list) else [calls]


def _arguments(value: Any) -> dict[str, Any]:
    arguments = _parsed(value) if value not in (None, "") else {}
    if not isinstance(arguments, dict):
        raise TypeError(type(arguments))
    return arguments


def _parsed(value: Any) -> Any:
    return parse_json(value) if isinstance(value, str) else value


def _check_turns(messages: list[Message]) -> None:
    turns = [m for i, m in enumerate(messages) if i or m["role"] != "system"]
    asks = True
    for number, message in enumerate(turns, 1):
        role = message["role"]
        if role == "tool" and number > 1 and turns[number - 2]["role"] == "tool":
            continue  # the results of several calls at once
        if role not in (("user", "tool") if asks else ("assistant",)):
            expected = "a question" if asks else "an answer"
            raise UnusableRow(f"turn {number} is of role {role}, where {expected} was expected")
        asks = not asks
    if not turns or not asks:
        raise UnusableRow("no answer: the last message is not the assistant's")
    if not turns[-1]["content"].strip() and "tool_calls" not in turns[-1]:
        raise UnusableRow("no answer: the last message is empty")


def _system(columns: Mapping[str, str], values: dict[str, Any]) -> list[Message]:
    text = _text(values.get(columns["system"]), "system") if "system" in columns else ""
    return [{"role": "system", "content": text}] if text else []


def _tools(columns: Mapping[str, str], values: dict[str, Any]) -> list[Any] | None:
    tools = values.get(columns["tools"]) if "tools" in columns else None
    if not tools:
        return None
    try:
        parsed = _parsed(tools)
    except ValueError as error:
        raise UnusableRow("tools is not valid JSON") from error
    described = parsed if isinstance(parsed, list) else [parsed]
    try:
        return [_tool(_parsed(one)) for one in described] or None
    except (ValueError, TypeError) as error:
        raise UnusableRow("tools is not a list of function descriptions") from error


def _tool(tool: Any) -> dict[str, Any]:
    """Return a function description in the form that chat templates expect."""
    if not isinstance(tool, dict) or not ("function" in tool or "name" in tool):
        raise TypeError(type(tool))
    return tool if "function" in tool else {"type": "function", "function": tool}


def _text(value: Any, name: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        if not value.isascii() and _SURROGATE.search(value):
            raise UnusableRow(f"{name} contains half a surrogate pair, which is not a character")
        return value
    if isinstance(value, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in value
    ):
        return "".join(_text(part["text"], name) for part in value)
    raise UnusableRow(f"{name} is a {type(value).__name__}, not text")
