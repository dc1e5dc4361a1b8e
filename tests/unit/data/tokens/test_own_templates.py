"""Answers in the chat templates of models that write them each in its own way.

The templates below have, shortened, what is peculiar in those of the families they are named for.
"""

import pytest
from transformers import AutoTokenizer

from raytrain_adv.data.read.formats import Conversation, UnusableRow
from raytrain_adv.data.tokens.own_template import OwnTemplate
from tests.unit.data.sample_rows import TINY_LLAMA

ROLE = "<|im_start|>{{ m.role }}\n"
ASK = "{% if add_generation_prompt %}"
CALLS = (
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}</tool_call>{% endfor %}"
)
TOOLS = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
LAST_QUESTION = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
THOUGHT = (
    "{% set thought = m.reasoning_content or '' %}{% set text = m.content or '' %}"
    "{% if '</think>' in text %}{% set thought = text.split('</think>')[0].split('<think>')[-1] %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
TEMPLATES = {
    "qwen3": TOOLS + LAST_QUESTION + "{% for m in messages %}" + ROLE + THOUGHT
    + "{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}"
    "<think>\n{{ thought.strip('\n') }}\n</think>\n\n{% endif %}{{ text }}" + CALLS
    + "<|im_end|>\n{% endfor %}" + ASK + "<|im_start|>assistant\n{% endif %}",
    "nemotron3": TOOLS + LAST_QUESTION + "{% for m in messages %}" + ROLE + THOUGHT
    + "{% if m.role == 'assistant' %}{% if thought and loop.index0 > ns.last %}"
    "<think>\n{{ thought.strip('\n') }}\n</think>{% else %}<think></think>{% endif %}{% endif %}"
    "{{ text }}" + CALLS + "<|im_end|>\n{% endfor %}"
    + ASK + "<|im_start|>assistant\n<think>\n{% endif %}",
    "phi3": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    + ASK + "<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    "gpt_oss": "{% for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant"
    "{% if loop.last and m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "<|start|>assistant{% endif %}<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% else %}"
    "<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    + ASK + "<|start|>assistant{% endif %}",
    "glm4_moe": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}" + CALLS + "{% endfor %}"
    + ASK + "<|assistant|>\n{% endif %}",
    "kimi_k2": "{% for m in messages %}<|{{ m.role }}|>{% for c in m.tool_calls or [] %}"
    "<|call|>{{ c.id }} {{ c.function.arguments | tojson }}{% endfor %}"
    "{% if m.role == 'tool' %}{{ m.name }}: {% endif %}{{ m.content }}<|end|>{% endfor %}"
    + ASK + "<|assistant|>{% endif %}",
    "smolvlm": "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|end|>{% endfor %}"
    + ASK + "<|assistant|>{% endif %}",
    "mistral": "{% for m in messages %}{% if m.role == 'user' %}[INST]"
    "{{ messages[0].content + '\n\n' if loop.last and messages[0].role == 'system' else '' }}"
    "{{ m.content }}[/INST]{% elif m.role == 'assistant' %}{{ m.content }}"
    "{{ eos_token }}{% endif %}{% endfor %}",
    "deepseek3": "{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}"
    "<|assistant|><|call|>{% for c in m.tool_calls %}"
    "{{ c.function.name + ' ' + c.function.arguments }}"
    "{% endfor %}<|end|>{% elif m.role == 'assistant' %}<|assistant|>"
    "{{ m.content.split('</think>')[-1] }}<|end|>"
    "{% elif m.role == 'tool' %}<|out|>{{ m.content }}{% else %}<|user|>{{ m.content }}{% endif %}"
    "{% endfor %}" + ASK + "<|assistant|><think>\n{% endif %}",
}  # fmt: skip
ADDED = (
    "<|im_start|>", "<|im_end|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|start|>",
    "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|out|>", "<|tool|>",
    "<think>", "</think>",
)  # fmt: skip


def asks(text):
    return {"role": "user", "content": text}


def says(text, **more):
    return {"role": "assistant", "content": text, **more}


def calls(*arguments):
    made = [{"type": "function", "function": {"name": "add", "arguments": a}} for a in arguments]
    return says("", tool_calls=made)


def result(text):
    return {"role": "tool", "content": text}


TURNS = [asks("Q1"), says("A1"), asks("Q2"), says("A2")]
THOUGHTS = [
    asks("Q1"), says("A1", reasoning_content="T1"),
    asks("Q2"), says("<think>\nT2\n</think>\n\nA2"),
]  # fmt: skip
RESULTS = [asks("Q1"), calls({"a": 1}, {"a": 2}), result("R1"), result("R2"), says("A1")]
TWICE = [asks("Q1"), calls({"a": 1}), result("R1"), says("A1"), *RESULTS]
QWEN = "<|im_start|>{}\n{}<|im_end|>\n".format
OPEN = "<|im_start|>assistant\n"
CALL = '<tool_call>add {{"a": {}}}</tool_call>'.format
CASES = {  # in brackets what is trained
    ("qwen3", "turns"): (TURNS, QWEN("user", "Q1") + OPEN + "[A1<|im_end|>\n]" + QWEN("user", "Q2")
        + OPEN + "[<think>\n\n</think>\n\nA2<|im_end|>\n]"),
    ("qwen3", "thoughts"): (THOUGHTS, QWEN("user", "Q1") + OPEN + "[A1<|im_end|>\n]"
        + QWEN("user", "Q2") + OPEN + "[<think>\nT2\n</think>\n\nA2<|im_end|>\n]"),
    ("qwen3", "two results"): (RESULTS, QWEN("user", "Q1") + OPEN
        + f"[{CALL(1)}{CALL(2)}<|im_end|>\n]"
        + QWEN("tool", "R1") + QWEN("tool", "R2") + OPEN
        + "[<think>\n\n</think>\n\nA1<|im_end|>\n]"),
    ("qwen3", "unicode"): ([asks("é😀"), says("中文"), asks("ü"), says("😀")],
        QWEN("user", "é😀") + OPEN + "[中文<|im_end|>\n]" + QWEN("user", "ü") + OPEN
        + "[<think>\n\n</think>\n\n😀<|im_end|>\n]"),
    ("qwen3", "same words"): ([asks("A"), says("A"), asks("A"), says("A")],
        QWEN("user", "A") + OPEN + "[A<|im_end|>\n]" + QWEN("user", "A") + OPEN
        + "[<think>\n\n</think>\n\nA<|im_end|>\n]"),
    ("qwen3", "empty answer"): ([asks("Q1"), says(""), *TURNS[2:]],
        QWEN("user", "Q1") + OPEN + "[<|im_end|>\n]" + QWEN("user", "Q2") + OPEN
        + "[<think>\n\n</think>\n\nA2<|im_end|>\n]"),
    ("nemotron3", "turns"): (TURNS, QWEN("user", "Q1") + OPEN + "<think>[</think>A1<|im_end|>\n]"
        + QWEN("user", "Q2") + OPEN + "<think>[</think>A2<|im_end|>\n]"),
    ("nemotron3", "thoughts"): (THOUGHTS, QWEN("user", "Q1") + OPEN
        + "<think>[</think>A1<|im_end|>\n]" + QWEN("user", "Q2") + OPEN
        + "<think>\n[T2\n</think>A2<|im_end|>\n]"),
    ("phi3", "turns"): (TURNS, "<|user|>\nQ1<|end|>\n<|assistant|>\n[A1<|end|>\n]<|user|>\n"
        "Q2<|end|>\n<|assistant|>\n[A2<|end|>\n<|endoftext|>]"),
    ("gpt_oss", "turns"): (TURNS, "<|start|>user<|message|>Q1<|end|><|start|>assistant"
        "[<|channel|>final<|message|>A1<|end|>]<|start|>user<|message|>Q2<|end|><|start|>assistant"
        "[<|channel|>final<|message|>A2<|return|>]"),
    ("gpt_oss", "thoughts"): (THOUGHTS, "<|start|>user<|message|>Q1<|end|><|start|>assistant"
        "[<|channel|>final<|message|>A1<|end|>]<|start|>user<|message|>Q2<|end|><|start|>assistant"
        "[<|channel|>analysis<|message|>T2<|end|><|start|>assistant"
        "<|channel|>final<|message|>A2<|return|>]"),
    ("glm4_moe", "turns"): (TURNS, "<|user|>\nQ1<|assistant|>\n[A1<|user|>]\nQ2<|assistant|>\n"
        "[A2<|endoftext|>]"),
    ("deepseek3", "turns"): (TURNS, "<|user|>Q1<|assistant|>[A1<|end|>]<|user|>Q2<|assistant|>"
        "[A2<|end|>]"),
}  # fmt: skip


@pytest.fixture(scope="module")
def make_own():
    """A function from a chat template to its renderer, with the special tokens of all above."""

    def make(source, thinks=True):
        tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
        tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
        tokenizer.add_tokens(list(ADDED), special_tokens=True)
        return OwnTemplate(tokenizer, source, None, thinks)

    return make


def marked(pieces):
    return "".join(f"[{p.text}]" if p.is_answer else p.text for p in pieces)


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_answers_are_found_by_rendering(case, make_own):
    messages, expected = CASES[case]
    own = make_own(TEMPLATES[case[0]])
    assert marked(own(Conversation(messages))) == expected.replace("[]", "")


@pytest.mark.parametrize("form", ["by string", "no content"])
def test_function_calls_are_given_in_the_form_that_a_template_takes(form, make_own):
    source = TEMPLATES["deepseek3"]
    if form == "no content":
        source = source.replace("and m.tool_calls", "and m.content is none")
    found = marked(make_own(source)(Conversation(RESULTS)))
    assert 'add {"a": 1}' in found and 'add {"a": 2}' in found


def test_thoughts_that_a_template_would_remove_make_the_row_unusable(make_own):
    with pytest.raises(UnusableRow, match="removes the thoughts of the last answer"):
        make_own(TEMPLATES["deepseek3"])(Conversation(THOUGHTS))


def test_calls_of_a_template_that_writes_only_their_ids_have_the_functions_name(make_own):
    found = marked(make_own(TEMPLATES["kimi_k2"])(Conversation(TWICE)))
    assert [f'functions.add:{n} {{"a": {a}}}' in found for n, a in ((0, 1), (1, 1), (2, 2))] == [
        True, True, True,
    ]  # fmt: skip


def test_a_template_that_writes_only_parts_of_a_content_is_given_parts(make_own):
    expected = "<|user|>Q1<|end|><|assistant|>[A1<|end|>]<|user|>Q2<|end|><|assistant|>[A2<|end|>]"
    assert marked(make_own(TEMPLATES["smolvlm"])(Conversation(TURNS))) == expected


def test_a_system_message_that_a_template_drops_makes_the_row_unusable(make_own):
    own = make_own(TEMPLATES["mistral"])
    assert marked(own(Conversation(TURNS))).startswith("[INST]Q1[/INST][A1")
    with pytest.raises(UnusableRow, match="drops the system message"):
        own(Conversation([{"role": "system", "content": "S"}, *TURNS]))


def test_calls_at_the_end_of_a_bare_template_end_with_the_token_of_their_results(make_own):
    found = marked(make_own(TEMPLATES["glm4_moe"])(Conversation([asks("Q1"), calls({"a": 1})])))
    assert found.endswith(f"{CALL(1)}<|tool|>]")


def test_marks_that_touch_share_no_end(make_own):
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% generation %}{% endgeneration %}<|end|>{% else %}<|user|>"
        "{{ m.content }}<|assistant|>{% endif %}{% endfor %}"
    )
    found = marked(make_own(source)(Conversation(TURNS)))
    assert found.replace("][", "") == (
        "<|user|>Q1<|assistant|>[A1<|end|>]<|user|>Q2<|assistant|>[A2<|end|>]"
    )


def test_several_calls_are_not_cut_to_one(make_own):
    source = TEMPLATES["qwen3"].replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    with pytest.raises(UnusableRow, match="several calls at once"):
        make_own(source)(Conversation(RESULTS))


def test_text_beside_a_call_is_not_dropped(make_own):
    source = TEMPLATES["qwen3"].replace("{{ text }}", "{{ '' if m.tool_calls else text }}")
    talking = [RESULTS[0], {**RESULTS[1], "content": "Let me see."}, *RESULTS[2:]]
    with pytest.raises(UnusableRow, match="writes no text before function calls"):
        make_own(source)(Conversation(talking))


def test_text_before_a_call_is_not_written_after_its_result(make_own):
    source = (
        "{% for m in messages %}{% if m.role != 'tool' %}<|{{ m.role }}|>" + CALLS
        + "{% if m.tool_calls %}{% for r in messages if r.role == 'tool' %}<|tool|>{{ r.content }}"
        "{% endfor %}{% endif %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
        + ASK + "<|assistant|>{% endif %}"
    )  # fmt: skip
    talking = [RESULTS[0], {**RESULTS[1], "content": "Let me see."}, *RESULTS[2:]]
    assert "A1" in marked(make_own(source)(Conversation(RESULTS)))
    with pytest.raises(UnusableRow, match="writes no text before function calls"):
        make_own(source)(Conversation(talking))


def test_whatever_a_template_raises_makes_the_row_unusable(make_own):
    with pytest.raises(UnusableRow, match="refuses it"):
        make_own("{{ messages[0].content + 1 }}")(Conversation(TURNS))


def test_a_thought_before_a_call_is_kept(make_own):
    thinking = [RESULTS[0], {**RESULTS[1], "reasoning_content": "T1"}, *RESULTS[2:]]
    assert "[<think>\nT1\n</think>\n\n<tool_call>" in marked(
        make_own(TEMPLATES["qwen3"])(Conversation(thinking))
    )


def test_calls_of_an_earlier_question_are_found(make_own):
    found = marked(make_own(TEMPLATES["nemotron3"])(Conversation(TWICE)))
    assert found.count("[") == found.count("]") == 4


def test_a_result_has_the_id_of_the_call_that_it_answers(make_own):
    source = TEMPLATES["kimi_k2"].replace("{{ m.name }}", "{{ m.tool_call_id }}")
    row = [*RESULTS[:2], {**RESULTS[2], "call": 1}, RESULTS[4]]
    assert "<|tool|>functions.add:1: R1<|end|>" in marked(make_own(source)(Conversation(row)))
