"""Rows in the shapes of LLaMA-Factory's demo files: every template trains all of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from raytrain_adv.data.prepare import prepare
from tests.unit.data.tokens.template_tokenizer import tokenizer

TOOL = {
    "name": "find_train",
    "description": "Find a train",
    "parameters": {"type": "object", "properties": {"to": {"type": "string"}}, "required": ["to"]},
}
TOOLS = json.dumps([TOOL])
WRAPPED = json.dumps([{"type": "function", "function": TOOL}])
CALL = {"name": "find_train", "arguments": {"to": "Köln"}}


def said(kind: str, text: str) -> dict[str, str]:
    return {"from": kind, "value": text}


def parts(role: str, *content: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"role": role, "content": [{"type": t, "value": v} for t, v in content], **more}


SHAPES: dict[str, list[dict[str, Any]]] = {
    "alpaca": [
        {"instruction": "Name a river", "input": "in Italy", "output": "Po"},
        {"instruction": "2 + 2?", "input": "", "output": "4", "system": "", "history": []},
        {"instruction": "And?", "output": "6", "history": [["3 + 3?", "six"]], "system": "Count."},
    ],
    "sharegpt with tools": [
        {
            "conversations": [
                said("human", "When is the next train?"),
                said("gpt", "Where to?"),
                said("human", "To Köln."),
                said("function_call", json.dumps(CALL)),
                said("observation", '{"at": "14:05"}'),
                said("gpt", "At 14:05."),
            ],
            "tools": TOOLS,
        },
        {"conversations": [said("human", "Hi"), said("gpt", "Hello.")], "tools": ""},
        {"conversations": [said("human", "Hi"), said("gpt", "Hello.")], "tools": "[]"},
    ],
    "reasoning with tools": [
        {
            "messages": [
                parts("system", ("text", "Use the tools.")),
                parts("user", ("text", "A train to Köln?")),
                parts("assistant", ("reasoning", "Look it up."), ("tool_call", json.dumps(CALL))),
                parts("tool", ("text", "14:05")),
                parts("assistant", ("reasoning", "It is found."), ("text", "At 14:05.")),
            ],
            "tools": WRAPPED,
        },
    ],
    "v1 parts": [
        {
            "messages": [
                parts("user", ("text", "hi"), loss_weight=0.0),
                parts("assistant", ("text", "I am {{name}}."), loss_weight=1.0),
            ]
        }
    ],
    "openai": [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "A train?"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {**CALL, "arguments": json.dumps(CALL["arguments"])},
                        }
                    ],
                },
                {"role": "tool", "content": "14:05", "tool_call_id": "1"},
                {"role": "assistant", "content": "At 14:05.", "tool_calls": None},
            ],
            "tools": [{"type": "function", "function": TOOL}],
        },
    ],
}


@pytest.fixture(scope="module")
def any_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the tokenizer that has the marks of all templates."""
    folder = tmp_path_factory.mktemp("any")
    tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 100000}')
    return str(folder)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_in_the_shape_of_a_demo_file_are_all_trained(shape, make_job, write_rows, any_model):
    rows = write_rows(SHAPES[shape])
    for name in ("qwen", "qwen3", "qwen3_5", "llama3", "mistral", "gemma4", "glm4_7", "default"):
        job = make_job(model_name_or_path=any_model, dataset=rows, template=name, cutoff_len=4096)
        counts = prepare(job, lambda sentence: None).stats["rows"]
        assert (counts["unusable"], counts["used"]) == (0, len(SHAPES[shape])), (name, counts)


def test_a_pretraining_row_is_its_text(make_job, write_rows, any_model):
    rows = write_rows([{"text": "A river flows."}, {"text": "It ends in the sea."}])
    job = make_job(model_name_or_path=any_model, dataset=rows, stage="pt", packing=True)
    counts = prepare(job, lambda sentence: None).stats["rows"]
    assert (counts["read"], counts["unusable"]) == (2, 0)
