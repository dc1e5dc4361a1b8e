"""Fourteen conversations, and how a template writes them."""

from typing import Any

from raytrain_adv.data.read.formats import UnusableRow
from raytrain_adv.data.tokens.page import Page, in_pieces
from raytrain_adv.data.tokens.templates import TEMPLATES

NAMES = (
    "qwen", "qwen3", "qwen3_nothink", "qwen3_5", "llama3", "mistral", "gemma", "glm4_moe",
    "gpt_oss", "deepseekr1", "seed_oss", "minimax2", "lfm2", "granite4", "alpaca",
)  # fmt: skip
TOOL = {
    "name": "add",
    "description": "Add numbers",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer", "description": "one"}},
        "required": ["a"],
    },
}
TOOLS = [{"type": "function", "function": TOOL}]
THOUGHT = "<think>\nT{}\n</think>\n\n".format


def _says(role: str, text: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **more}


def _calls(*arguments: Any, text: str = "") -> dict[str, Any]:
    made = [{"type": "function", "function": {"name": "add", "arguments": a}} for a in arguments]
    return _says("assistant", text, tool_calls=made)


S, Q1, Q2 = _says("system", "S"), _says("user", "Q1"), _says("user", "Q2")
A1, A2, R1, R2 = (
    _says(role, text)
    for role, text in (("assistant", "A1"), ("assistant", "A2"), ("tool", "R1"), ("tool", "R2"))
)
CASES: dict[str, tuple[list[dict[str, Any]], list[Any] | None]] = {
    "one turn": ([Q1, A1], None),
    "system": ([S, Q1, A1], None),
    "turns": ([S, Q1, A1, Q2, A2], None),
    "tools": ([Q1, A1], TOOLS),
    "tools and system": ([S, Q1, A1], TOOLS),
    "call": ([S, Q1, _calls({"a": 1, "u": "é"}), R1, A1], TOOLS),
    "last is a call": ([Q1, _calls({"a": 1})], TOOLS),
    "two calls, two results": ([Q1, _calls({"a": 1}, {"a": [2]}), R1, R2, A1], TOOLS),
    "calls twice": ([Q1, _calls({"a": 1}), R1, A1, Q2, _calls({"a": 2}), R2, A2], TOOLS),
    "thoughts": ([Q1, _says("assistant", THOUGHT(1) + "A1"), Q2, {**A2, "reasoning_content": "T2"}],
                 None),
    "thought before a call": ([Q1, _calls({"a": 1}, text=THOUGHT(1)), R1, A1], TOOLS),
    "empty answer": ([Q1, _says("assistant", ""), Q2, A2], None),
    "unicode": ([_says("user", "é😀{{ x }}"), _says("assistant", "中文 '\"\\n"), Q2, A2], None),
    "very long": ([_says("user", "w " * 99), _says("assistant", "v " * 99)], None),
}  # fmt: skip


class Tokens:
    """The two tokens that a template takes from a tokenizer."""

    special_tokens_map = {"bos_token": "<s>", "eos_token": "</s>"}  # noqa: RUF012


def marked_text(name: str, case: str, **how: Any) -> str:
    """Return the text of a conversation, what is trained in brackets; or why there is none."""
    messages, tools = CASES[case]
    template = TEMPLATES[name]
    try:
        text, spans = Page(Tokens(), template.write(**how), tools).marked(messages)  # type: ignore[arg-type]
    except UnusableRow as error:
        return str(error)
    marked = "".join(f"⟦{p.text}⟧" if p.is_answer else p.text for p in in_pieces(text, spans))
    return marked if case == "tools" or not tools else _without_description(marked, name)


def _without_description(text: str, name: str) -> str:
    """Shorten the description of the tools, which the case "tools" has in full."""
    head = TEMPLATES[name].write().partition("{#- The families")[0] + "{{- describe(tools) -}}"
    described = Page(Tokens(), head, TOOLS).write([])  # type: ignore[arg-type]
    return text.replace(described.strip(), "[tools]")
