"""What files from elsewhere may cost: endless templates, rows of megabytes, crashes in Rust."""

import threading
import time
from dataclasses import replace
from functools import partial

import pytest

from raytrain_adv.data.read.formats import Conversation
from raytrain_adv.data.tokens import tokenize
from raytrain_adv.data.tokens.limits import template_time, tokenizer_errors
from raytrain_adv.data.tokens.tokenize import Recipe, Tokenizer
from raytrain_adv.errors import JobError, no_panics

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
RECIPE = Recipe(None, None, cutoff_len=128, train_on_prompt=False, mask_history=False)


class PanicException(BaseException):  # pyo3's name
    """What a panic in Rust is in Python."""


def with_template(tokenizer, chat_template):
    copy = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    copy.chat_template = chat_template
    return copy


class Rows:
    """A layout of rows that are conversations already."""

    def conversation(self, values):
        return Conversation(values)


def chat(text):
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]


def test_an_endless_chat_template_is_stopped_and_named(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tokenize, "template_time", partial(template_time, seconds=0.5))
    began = time.monotonic()
    with pytest.raises(JobError, match="chat template takes too long") as caught:
        Tokenizer(with_template(tiny_tokenizer, ENDLESS + PLAIN), RECIPE)(
            [("rows.jsonl, line 1", chat("a"))], Rows()
        )
    assert time.monotonic() - began < 30 and "0.5 s" in caught.value.found


def test_a_template_in_time_is_left_alone(monkeypatch):
    timers, timer = [], threading.Timer
    monkeypatch.setattr(
        threading, "Timer", lambda *given: timers.append(timer(*given)) or timers[0]
    )
    with template_time("rows", 600.0):
        assert timers[0].is_alive()
    timers[0].join(300)
    assert not timers[0].is_alive()


def test_a_row_of_megabytes_is_left_out_and_counted(tiny_tokenizer):
    tokenizer = Tokenizer(with_template(tiny_tokenizer, PLAIN), RECIPE)
    tokenizer.longest = 1000
    chunk = tokenizer([("line 1", chat("a" * 2000)), ("line 2", chat("a"))], Rows())
    assert len(chunk.lengths) == 1 and chunk.num_read == 2
    ((where, why),) = chunk.unusable
    assert where == "line 1" and "more than 1,000" in why


def test_a_row_of_endless_turns_is_left_out_before_it_is_rendered(tiny_tokenizer):
    """200,000 messages took the chat template's minute, which ended the job."""
    turns = chat("a") * 5001
    tokenizer = Tokenizer(with_template(tiny_tokenizer, PLAIN), RECIPE)
    chunk = tokenizer([("line 1", turns), ("line 2", chat("a"))], Rows())
    assert chunk.unusable == [("line 1", "10,002 messages, more than 10,000")]


def test_a_crash_of_the_tokenizers_library_is_an_error_that_names_the_file():
    with (
        pytest.raises(JobError, match="crashed on the files of m") as caught,
        no_panics("the files of m"),
    ):
        raise PanicException("index out of bounds")
    assert "index out of bounds" in caught.value.found
    with pytest.raises(KeyboardInterrupt), no_panics("x"):
        raise KeyboardInterrupt


def test_whatever_a_tokenizer_raises_is_an_error_that_names_it(tiny_tokenizer):
    """A model_max_length that is a text came as TypeError, out of the first conversation."""
    tokenizer = with_template(tiny_tokenizer, PLAIN)
    tokenizer.model_max_length = "1024"
    with pytest.raises(JobError, match="The tokenizer fails on") as caught:
        Tokenizer(tokenizer, RECIPE)([("line 1", chat("a"))], Rows())
    assert "TypeError" in caught.value.found
    with pytest.raises(JobError, match="crashed"), tokenizer_errors("x"):
        raise PanicException
    with pytest.raises(JobError, match="its own"), tokenizer_errors("x"):
        raise JobError("its own")
    with pytest.raises(MemoryError), tokenizer_errors("x"):
        raise MemoryError


@pytest.mark.parametrize(
    "source",
    [
        "{{ range(10 ** 6) | list }}",
        "{{ 1 // 0 }}",
        "{{ 'a' * 10 ** 15 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ missing.name }}",
    ],
    ids=["range", "division", "memory", "recursion", "missing"],
)
def test_a_template_that_fails_leaves_the_row_out_with_the_reason(tiny_tokenizer, source):
    """OverflowError, the sandbox's own refusal, left the whole program."""
    tokenizer = with_template(tiny_tokenizer, PLAIN + "{% if messages|length > 1 %}" + source)
    tokenizer.chat_template += "{% endif %}"
    try:
        chunk = Tokenizer(tokenizer, RECIPE)([("line 1", chat("a"))], Rows())
    except JobError as error:
        assert "template" in str(error)
    else:
        assert [place for place, _ in chunk.unusable] == ["line 1"]


def test_control_characters_of_a_files_text_do_not_reach_the_terminal():
    text = str(JobError("a\x1b[2Jb\x9b\x07", "c\td\ne", "f\r"))
    assert text == "a?[2Jb??\n  found: c\td\n         e\n  fix:   f"
    assert str(JobError("half of \ud800")).encode() == b"half of ?"


def tokens_of(tokenizer, text, answer="Yes.", **keys):
    recipe = replace(RECIPE, **keys)
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    chunk = Tokenizer(with_template(tokenizer, PLAIN), recipe)([("line 1", messages)], Rows())
    return chunk, tokenizer.decode(chunk.ids)


@pytest.mark.parametrize("place", ["text", "answer"])
def test_control_tokens_in_messages_are_counted_and_letters_if_the_job_wants_them(
    tiny_tokenizer, place
):
    control = tiny_tokenizer.convert_tokens_to_ids("<|user|>")
    given = {"text": "Hi", "answer": "Yes."} | {place: "a<|user|> b<|assistant|>"}
    as_tokens, _ = tokens_of(tiny_tokenizer, **given)
    assert as_tokens.num_control == 1 and control in as_tokens.ids
    as_letters, text = tokens_of(tiny_tokenizer, **given, split_special_tokens=True)
    assert as_letters.num_control == 1
    assert not {control, tiny_tokenizer.convert_tokens_to_ids("<|assistant|>")} & {*as_letters.ids}
    assert f"user: {given['text']}\nassistant: {given['answer']}" in text
    plain, _ = tokens_of(tiny_tokenizer, "Hi", split_special_tokens=True)
    assert plain.num_control == 0


def test_an_answer_with_control_tokens_is_trained_whole_where_history_is_masked(tiny_tokenizer):
    keys = {"split_special_tokens": True, "mask_history": True}
    chunk, _ = tokens_of(tiny_tokenizer, "Hi", "a<|user|>b", **keys)
    trained = tiny_tokenizer.decode(chunk.ids[chunk.trained])
    assert "a<|user|>b" in trained and "Hi" not in trained
