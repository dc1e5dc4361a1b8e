"""Own templates, and the tokenizers' chat templates."""

import json
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from raytrain_adv.config.templates import Template
from raytrain_adv.data.read.formats import Conversation, UnusableRow
from raytrain_adv.data.tokens.templates import TEMPLATES, find_template
from raytrain_adv.data.tokens.tokenize import renderer
from raytrain_adv.data.tokens.tokenizer import load_tokenizer
from raytrain_adv.errors import JobError
from tests.unit.data.tokens.template_cases import CASES, NAMES, marked_text
from tests.unit.data.tokens.test_template_ids import why_different

# Text, and what a templating language might take for its own.
TEXTS = (
    st.lists(
        st.text(max_size=8)
        | st.sampled_from(
            ["{content}", "{bos}", "{eos}", "{{ eos_token }}", "{% if %}", "{#", "\\n"]
        ),
        min_size=1,
        max_size=4,
    )
    .map("a".join)
    .filter(bool)
)
CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
]
H = "<|start_header_id|>{}<|end_header_id|>\n\n"
LLAMA3_SYSTEM = "<s>" + H.format("system") + "S<|eot_id|>"
LLAMA3_TURN = H.format("user") + "Q{n}<|eot_id|>" + H.format("assistant") + "[A{n}<|eot_id|>]"
CHATML_TURN = "<|im_start|>user\nQ{n}<|im_end|>\n<|im_start|>assistant\n[A{n}<|im_end|>\n]"
GEMMA_TURN = (
    "<start_of_turn>user\n{lead}Q{n}<end_of_turn>\n<start_of_turn>model\n[A{n}<end_of_turn>\n]"
)
PHI_TURN = "<|user|>\nQ{n}<|end|>\n<|assistant|>\n[A{n}<|end|>\n]"
ALPACA_TURN = "### Instruction:\nQ{n}\n\n### Response:\n[A{n}</s>]\n\n"
DEFAULT_TURN = "Human: Q{n}</s>\nAssistant:[A{n}</s>]\n"


def turns(form: str, lead: str = "") -> str:
    return form.format(n=1, lead=lead) + form.format(n=2, lead="")


EXPECTED = {  # in brackets what the loss is taken on
    "llama3": LLAMA3_SYSTEM + turns(LLAMA3_TURN),
    "chatml": "<|im_start|>system\nS<|im_end|>\n" + turns(CHATML_TURN),
    "qwen": "<|im_start|>system\nS<|im_end|>\n" + turns(CHATML_TURN),
    "mistral": "<s>"
    + turns("[INST] {lead}Q{n}[/INST]< A{n}</s>>", "S\n\n")
    .replace("< A1</s>>", "[ A1</s>]")
    .replace("< A2</s>>", "[ A2</s>]"),
    "gemma": "<s>" + turns(GEMMA_TURN, "S\n\n"),
    "phi": "<|system|>\nS<|end|>\n" + turns(PHI_TURN),
    "alpaca": "S" + turns(ALPACA_TURN),
    "default": "System: S</s>\n" + turns(DEFAULT_TURN),
}


@pytest.fixture(scope="module")
def marked_tokenizer(marked_model):
    return AutoTokenizer.from_pretrained(marked_model)


def pieces_of(tokenizer, name, messages):
    return renderer(tokenizer, name, None)(Conversation(messages))


def test_job_file_knows_every_template():
    assert set(get_args(Template)) == set(TEMPLATES)


@pytest.mark.parametrize("name", EXPECTED)
def test_template_writes_a_conversation_as_llama_factory_does(name, marked_tokenizer):
    pieces = pieces_of(marked_tokenizer, name, CHAT)
    assert "".join(f"[{p.text}]" if p.is_answer else p.text for p in pieces) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
@settings(max_examples=50)
@given(texts=st.lists(TEXTS, min_size=5, max_size=5))
def test_any_text_survives_every_template(name, marked_tokenizer, texts):
    messages = [{**m, "content": text} for m, text in zip(CHAT, texts, strict=True)]
    names = [f"TEXT{i}" for i in range(5)]
    expected = [
        piece.text
        for piece in pieces_of(
            marked_tokenizer,
            name,
            [{**m, "content": n} for m, n in zip(CHAT, names, strict=True)],
        )
    ]
    for i, text in enumerate(texts):
        expected = [text.join(part.split(f"TEXT{i}")) for part in expected]
    assert [p.text for p in pieces_of(marked_tokenizer, name, messages)] == expected


@pytest.mark.parametrize("name", EXPECTED)
def test_model_folder_gets_a_chat_template_that_writes_what_was_trained_on(
    name, make_job, marked_model
):
    tokenizer = load_tokenizer(make_job(model_name_or_path=marked_model, template=name))
    render = renderer(tokenizer, name, None)
    for messages in (CHAT, CHAT[1:], CHAT[1:3]):
        trained_on = "".join(p.text for p in render(Conversation(messages)))
        assert tokenizer.apply_chat_template(messages, tokenize=False) == trained_on
        asked = tokenizer.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True
        )
        assert trained_on.startswith(asked)


@pytest.mark.parametrize("name", EXPECTED)
def test_saved_chat_template_survives_quotes_and_backslashes(name, make_job, marked_model):
    tokenizer = load_tokenizer(make_job(model_name_or_path=marked_model, template=name))
    messages = [
        {"role": "user", "content": 'say "it\'s" \\n {{ now }}'},
        {"role": "assistant", "content": "ok {content} {eos}"},
    ]
    trained_on = "".join(p.text for p in renderer(tokenizer, name, None)(Conversation(messages)))
    assert tokenizer.apply_chat_template(messages, tokenize=False) == trained_on
    assert "ok {content} {eos}" in trained_on


def test_template_makes_its_end_of_turn_the_eos_token(make_job, marked_model):
    tokenizer = load_tokenizer(make_job(model_name_or_path=marked_model, template="llama3"))
    assert tokenizer.eos_token == "<|eot_id|>"


def test_template_whose_tokens_are_missing_is_refused(make_job):
    with pytest.raises(JobError, match=r"no token <\|im_end\|>"):
        load_tokenizer(make_job(template="chatml"))


def test_unknown_template_names_the_nearest():
    with pytest.raises(JobError, match="did you mean llama3"):
        find_template("lama3")


def test_tokenizer_without_chat_template_and_no_template_is_refused(make_job, marked_model):
    with pytest.raises(JobError, match="no chat template, and the job names none"):
        load_tokenizer(make_job(model_name_or_path=marked_model))


def test_folder_without_tokenizer_is_refused_by_name(make_job, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(JobError, match="could not be loaded"):
        load_tokenizer(make_job(model_name_or_path=str(tmp_path / "empty")))


def test_qwen_has_its_default_system_message_and_the_job_may_change_it(make_job, marked_model):
    tokenizer = load_tokenizer(make_job(model_name_or_path=marked_model, template="qwen"))
    question = Conversation(CHAT[1:3])
    assert "You are Qwen, created by Alibaba" in renderer(tokenizer, "qwen", None)(question)[0].text
    assert "system\nBe brief.<" in renderer(tokenizer, "qwen", "Be brief.")(question)[0].text


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL_CHAT = [
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "R"},
    {"role": "assistant", "content": "A"},
]


def test_qwen_writes_function_calls_and_their_results(marked_tokenizer):
    pieces = pieces_of(marked_tokenizer, "qwen", TOOL_CHAT)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
    assert pieces[1].text == call and pieces[1].is_answer
    assert "<tool_response>\nR\n</tool_response>" in pieces[2].text and not pieces[2].is_answer


PREFIX_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}<|end|>{% else %}{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def with_template(tokenizer, chat_template):
    copy = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    copy.chat_template = chat_template
    return copy


def answers(tokenizer, messages):
    return [p.text for p in renderer(tokenizer, None, None)(Conversation(messages)) if p.is_answer]


def test_answers_are_found_by_prefixes(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, PREFIX_TEMPLATE)
    assert answers(tokenizer, CHAT) == ["A1<|end|>\n", "A2<|end|>\n"]


def test_answers_are_found_by_generation_marks_with_the_end_token_after_them(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, MARKED_TEMPLATE)
    assert answers(tokenizer, CHAT) == ["A1<|end|>", "A2<|end|>"]


def test_generation_marks_that_hold_the_end_token_are_taken_as_they_are(tiny_tokenizer):
    assert answers(tiny_tokenizer, CHAT) == ["A1<|end|>", "A2<|end|>"]


def test_pieces_of_a_chat_template_add_up_to_its_text(tiny_tokenizer):
    for chat_template in (PREFIX_TEMPLATE, MARKED_TEMPLATE):
        tokenizer = with_template(tiny_tokenizer, chat_template)
        pieces = renderer(tokenizer, None, None)(Conversation(CHAT))
        text = tokenizer.apply_chat_template(CHAT, tokenize=False)
        assert "".join(p.text for p in pieces) == text


def test_answers_are_found_where_only_the_newest_is_written_with_its_thoughts(tiny_tokenizer):
    thinking = (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
        "{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = with_template(tiny_tokenizer, thinking)
    assert answers(tokenizer, CHAT) == ["A1<|end|>\n", "<think></think>A2<|end|>\n"]


def test_answers_are_found_where_more_messages_rewrite_the_beginning(tiny_tokenizer):
    counting = "{{ messages|length }}" + PREFIX_TEMPLATE
    assert answers(with_template(tiny_tokenizer, counting), CHAT) == ["A1<|end|>\n", "A2<|end|>\n"]


def test_row_that_the_chat_template_refuses_is_unusable_with_its_words(tiny_tokenizer):
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    )
    with pytest.raises(UnusableRow, match="No system role"):
        answers(with_template(tiny_tokenizer, strict + PREFIX_TEMPLATE), CHAT)


def test_function_calls_are_not_dropped_by_a_chat_template_that_does_not_know_them(tiny_tokenizer):
    with pytest.raises(UnusableRow, match="no form for function calls"):
        answers(with_template(tiny_tokenizer, PREFIX_TEMPLATE), TOOL_CHAT)


def test_tools_are_not_dropped_by_a_chat_template_that_does_not_know_them(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, PREFIX_TEMPLATE)
    with pytest.raises(UnusableRow, match="no form for tools"):
        renderer(tokenizer, None, None)(Conversation(CHAT, tools=[{"name": "add"}]))


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_differ_from_llama_factorys_are_as_reviewed(name):
    expected = json.loads((Path(__file__).parent / "expected_rows.json").read_text("utf-8"))
    differ = [case for case in CASES if why_different(name, case)]
    assert {case: marked_text(name, case) for case in differ} == expected[name]


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"thinks": False}, "<think>\n\n</think>\n\n⟦A1<|im_end|>\n⟧"),
        ({"thinks": True}, "⟦<think>\nT1\n</think>\n\nA1<|im_end|>\n⟧"),
        ({"drops_thoughts": True}, "⟦A1<|im_end|>\n⟧"),
    ],
)
def test_enable_thinking_decides_what_becomes_of_thoughts(how, text):
    assert "assistant\n" + text in marked_text("qwen3", "thoughts", **how)


def test_empty_thoughts_are_outside_the_loss_unless_thinking_is_enabled():
    empty = "<think>\n\n</think>\n\n"
    assert f"{empty}⟦A1" in marked_text("qwen3", "one turn", thinks=None)
    assert f"⟦{empty}A1" in marked_text("qwen3", "one turn", thinks=True)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_every_template_marks_each_answer_once(name):
    assert marked_text(name, "turns").count("⟦") == 2
