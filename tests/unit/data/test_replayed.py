"""Reports of other trainers about data, replayed here."""

import pytest

from raytrain_adv.data.prepare import prepare
from raytrain_adv.data.read.formats import Conversation
from tests.unit.data.test_formats import read
from tests.unit.data.tokens.test_own_templates import (
    TEMPLATES,
    asks,
    make_own,
    marked,
    result,
    says,
)

__all__ = ["make_own"]  # the fixture
TURN_END = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_tool_calls_that_are_null_are_as_if_absent():
    """LLaMA-Factory#10455: a TypeError for the whole dataset."""
    plain = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    nulls = [{**message, "tool_calls": None, "tool_call_id": None} for message in plain]
    assert read({"messages": nulls, "tools": None}) == read({"messages": plain})


def test_the_same_answer_twice_is_trained_twice_with_the_turns_end_that_is_no_eos(make_own):
    """AutoModel#3739: Gemma's turn ends otherwise than its text, and the last answer was masked."""
    turns = [asks("Q"), says("A"), result("R"), says("A")]
    answer = "<|im_start|>assistant\n[A<|im_end|>\n]"
    found = marked(make_own(TURN_END)(Conversation(turns)))
    assert found.count(answer) == 2 and found.count("[") == 2


@pytest.mark.parametrize("text", ["step one</think>The answer", "<think>r</think>The answer"])
def test_a_thought_is_trained_as_the_template_writes_it(make_own, text):
    """TRL#6363: an answer moved into the thought, or the thought was lost."""
    render = make_own(TEMPLATES["qwen3"])
    pieces = render(Conversation([asks("Q"), says(text)]))
    thought = text.partition("</think>")[0].removeprefix("<think>")
    trained = f"[<think>\n{thought}\n</think>\n\nThe answer<|im_end|>\n]"
    assert marked(pieces).endswith(trained)


def test_an_answer_wholly_beyond_cutoff_len_leaves_no_batch_without_labels(make_job, tmp_path):
    """TRL#6320: a batch whose labels were all masked gave NaN."""
    file = tmp_path / "rows.jsonl"
    row = '{"instruction": "%s", "input": "", "output": "%s"}\n'
    file.write_text(row % ("word " * 400, "End.") + row % ("Hi", "Yes."))
    for length in (3, 16, 64):
        data = prepare(make_job(dataset=str(file), cutoff_len=length), lambda text: None)
        rows = data.stats["rows"]
        assert len(data.train) + sum(rows["unusable_reasons"].values()) == 2
        for sequence in data.train:
            assert (sequence.labels >= 0).any() and len(sequence.input_ids) <= length
