"""Thoughts in the chat templates of models that want them each in another form.

The templates below have, shortened, what is peculiar in those of the families they are named for.
"""

import pytest

from raytrain_adv.data.read.formats import Conversation, UnusableRow
from tests.unit.data.tokens.test_own_templates import (
    ASK,
    CALLS,
    QWEN,
    RESULTS,
    TEMPLATES,
    THOUGHTS,
    asks,
    make_own,
    marked,
    says,
)

__all__ = ["make_own"]
TURN = "{% for m in messages %}<|{{ m.role }}|>"
END = "<|end|>{% endfor %}" + ASK + "<|assistant|>{% endif %}"
FORMS = {
    "gemma4": TURN + "{% if m.reasoning and m.tool_calls %}<|channel|>{{ m.reasoning }}<|message|>"
    "{% endif %}" + CALLS + "{{ m.content }}" + END,
    "kimi_k2_thinking": TURN + "{% if m.role == 'assistant' %}<think>"
    "{{ m.reasoning_content if m.tool_calls }}</think>{% endif %}"
    + CALLS + "{{ m.content }}" + END,
    "ministral3": TURN + "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'thinking' %}[THINK]{{ part.thinking }}[/THINK]"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}" + CALLS + END,
    "nemotron_nano2": TURN + "{% if m.role == 'assistant' %}<think>\n{% endif %}{{ m.content }}"
    + CALLS + "<|end|>{% endfor %}" + ASK + "<|assistant|><think>\n{% endif %}",
    "minicpm3": TURN + "{% if m.thought %}<|thought|>{{ m.thought }}<|thought|>{% endif %}"
    "{{ m.content }}" + CALLS + END,
    "prints": TURN + "{{ m.content }}" + CALLS + END,
}  # fmt: skip
ANSWERS = {
    "ministral3": "[[THINK]T2[/THINK]A2<|end|>]",
    "nemotron_nano2": "<think>\n[T2\n</think>\n\nA2<|end|>]",
    "minicpm3": "[<|thought|>T2<|thought|>A2<|end|>]",
    "prints": "[<think>\nT2\n</think>\n\nA2<|end|>]",
}
BOTH = ("under its key", "in its text")


def answered(how):
    """Return a question and an answer that has a thought."""
    if how == "in its text":
        return [asks("Q2"), says("<think>\nT2\n</think>\n\nA2")]
    return [asks("Q2"), says("A2", reasoning_content="T2")]


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize("family", ANSWERS)
def test_a_thought_is_written_in_the_form_of_the_model(family, how, make_own):
    found = marked(make_own(FORMS[family])(Conversation(answered(how))))
    assert found == "<|user|>Q2<|end|><|assistant|>" + ANSWERS[family]


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize("family", ["gemma4", "kimi_k2_thinking"])
def test_a_thought_without_a_form_makes_the_row_unusable(family, how, make_own):
    with pytest.raises(UnusableRow, match="removes the thoughts of the last answer"):
        make_own(FORMS[family])(Conversation(answered(how)))


def test_an_earlier_thought_without_a_form_is_left_out(make_own):
    turns = [*answered("in its text"), asks("Q3"), says("A3")]
    assert "<|assistant|>[A2<|end|>]" in marked(make_own(FORMS["gemma4"])(Conversation(turns)))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gemma4", "<|assistant|>[<|channel|>T1<|message|><tool_call>"),
        ("kimi_k2_thinking", "<|assistant|>[<think>T1</think><tool_call>"),
        ("ministral3", "<|assistant|>[[THINK]T1[/THINK]<tool_call>"),
        ("nemotron_nano2", "<|assistant|><think>\n[T1\n</think>\n\n<tool_call>"),
    ],
)
@pytest.mark.parametrize("how", BOTH)
def test_a_thought_before_a_call_is_written_in_the_form_of_the_model(
    family, expected, how, make_own
):
    thought = (
        {"content": "<think>\nT1\n</think>\n\n"} if how == BOTH[1] else {"reasoning_content": "T1"}
    )
    thinking = [RESULTS[0], {**RESULTS[1], **thought}, *RESULTS[2:]]
    assert expected in marked(make_own(FORMS[family])(Conversation(thinking)))


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize("family", ["qwen3", "gpt_oss", "gemma4", "ministral3", "prints"])
def test_enable_thinking_false_leaves_thoughts_out(family, how, make_own):
    own = make_own({**TEMPLATES, **FORMS}[family], thinks=False)
    found = marked(own(Conversation(answered(how))))
    assert "T2" not in found and "A2" in found


def test_enable_thinking_false_leaves_earlier_thoughts_out(make_own):
    found = marked(make_own(FORMS["prints"], thinks=False)(Conversation(THOUGHTS)))
    assert "T1" not in found and "T2" not in found


def test_empty_tags_in_a_text_are_not_doubled(make_own):
    row = [asks("Q1"), says("<think>\n\n</think>\n\nA1")]
    expected = QWEN("user", "Q1") + "<|im_start|>assistant\n[<think>\n\n</think>\n\nA1<|im_end|>\n]"
    assert marked(make_own(TEMPLATES["qwen3"])(Conversation(row))) == expected
