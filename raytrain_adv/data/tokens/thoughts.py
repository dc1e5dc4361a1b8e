"""Thoughts of answers, and the forms in which chat templates want them."""

import re
from collections.abc import Callable

from raytrain_adv.data.read.formats import Message

_IN_TEXT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_BESIDE = ("reasoning_content", "reasoning", "thinking", "thought", "tool_plan")
"""Keys under which chat templates look for thoughts."""
ThoughtForm = Callable[[Message, str, str], Message]
"""From a message, its thought and its other text to the message in the form."""


def split_thought(message: Message) -> tuple[str, str]:
    """Return an answer's thought and its other text; a thought may begin its text in tags."""
    thought, content = message.get("reasoning_content") or "", message.get("content") or ""
    found = None if thought else _IN_TEXT.match(content)
    return (found[1].strip("\n"), content[found.end() :]) if found else (thought, content)


def with_none(message: Message) -> Message:
    """Return an answer without its thoughts, and without empty tags in its text."""
    content = split_thought(message)[1]
    return {**_bare(message), "content": content if message.get("content") else message["content"]}


def beside(message: Message, thought: str, content: str) -> Message:
    """Write the thought under the keys of its own."""
    return {**message, **dict.fromkeys(_BESIDE, thought), "content": content}


def _in_parts(message: Message, thought: str, content: str) -> Message:
    """Write it as a part of the content, as Mistral's chat templates want it."""
    text = [{"type": "text", "text": content}] if content else []
    parts = [{"type": "thinking", "thinking": thought}, *text]
    return {**_bare(message), "content": parts}


def in_text(message: Message, thought: str, content: str) -> Message:
    """Write it in tags before the text; an answer that has it there is as it was."""
    if not message.get("reasoning_content"):
        return message
    return {**_bare(message), "content": f"<think>\n{thought}\n</think>\n\n{content}"}


def _continued(message: Message, thought: str, content: str) -> Message:
    """Write it without the opening tag, which the template writes itself."""
    return {**_bare(message), "content": f"{thought}\n</think>\n\n{content}"}


THOUGHT_FORMS: tuple[ThoughtForm, ...] = (beside, _in_parts, in_text, _continued)


def writes_thought(form: ThoughtForm, text: str, thought: str) -> bool:
    """Return whether a rendered `text` has the thought as the form means it: not a list in letters,
    and no tags in addition to those that the template writes itself.
    """
    if thought not in text:
        return False
    if form in (in_text, _continued):
        return text.count("<think>") == text.count("</think>") == 1
    return form is beside or not re.search(r"""["']type["']""", text)


def _bare(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "reasoning_content"}
