"""Files of prompts, and of answers."""

import json
from pathlib import Path

import pytest
import torch

from raytrain_adv import cli
from raytrain_adv.driver.commands.use.answer import batch, prompt_ids
from raytrain_adv.driver.commands.use.load import load
from raytrain_adv.driver.commands.use.prompts import read_prompts
from raytrain_adv.driver.commands.use.sampling import Sampling
from raytrain_adv.driver.commands.use.source import find
from raytrain_adv.errors import JobError

ROWS = [
    "One?",
    {"prompt": "Two?"},
    {"instruction": "Three", "input": "and?", "output": "Four."},
    {"question": "Five?", "answer": "Six."},
    {"messages": [{"role": "system", "content": "Count."}, {"role": "user", "content": "Seven?"}]},
    {"messages": [{"role": "user", "content": "Eight?"}, {"role": "assistant", "content": "9"}]},
    {"conversations": [{"from": "human", "value": "Ten?"}]},
]


def written(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompts_are_read_in_every_layout_with_or_without_answers(tmp_path):
    rows = read_prompts(written(tmp_path / "p.jsonl", ROWS))
    asked = [row.messages[-1]["content"] for row in rows]
    assert asked == ["One?", "Two?", "Three\nand?", "Five?", "Seven?", "Eight?", "Ten?"]
    answers = [row.reference for row in rows]
    assert answers == [None, None, "Four.", "Six.", None, "9", None]
    assert [m["role"] for m in rows[4].messages] == ["system", "user"]
    lines = tmp_path / "p.txt"
    lines.write_text("One?\n\nTwo?\n")
    assert [row.messages[0]["content"] for row in read_prompts(lines)] == ["One?", "Two?"]


def test_a_row_that_is_no_prompt_is_named(tmp_path):
    with pytest.raises(JobError, match=r"p\.jsonl:2 is not a prompt"):
        read_prompts(written(tmp_path / "p.jsonl", ["One?", {"text": "x"}]))


def test_answers_come_in_the_order_of_prompts_as_if_each_were_alone(runs, tmp_path, capsys):
    prompts, out = written(tmp_path / "p.jsonl", ROWS), tmp_path / "a.jsonl"
    command = ["generate", str(runs["qat"]), str(prompts), "-o", str(out), "--device", "cpu"]
    assert cli.main([*command, "max_new_tokens=6", "--batch-size", "3"]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    loaded = load(find(str(runs["qat"]))[0], torch.device("cpu"), "", False)
    greedy = Sampling(do_sample=False, max_new_tokens=6)
    for row, line in zip(read_prompts(prompts), found, strict=True):
        alone = batch(loaded, [prompt_ids(loaded, row.messages, True)], greedy)[0]
        assert (line["answer"], line["num_tokens"]) == (alone.text, alone.num_tokens)
        assert line["finish_reason"] == ("stop" if alone.is_whole else "length")
    assert f"wrote {len(ROWS)} answers" in capsys.readouterr().out
    assert cli.main(command) == 2
    assert "exists already" in capsys.readouterr().err
