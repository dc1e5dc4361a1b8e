"""Ids and labels of fourteen conversations in every template, as LLaMA-Factory makes them.

template_ids.npz was made by running LLaMA-Factory's template.py, formatter.py and tool_utils.py at
ff6d4d1 with the tokenizer of template_tokenizer.py. DIFFERENT lists where a template here differs,
and why.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from raytrain_adv.data.read.formats import Conversation, UnusableRow
from raytrain_adv.data.tokens.templates import TEMPLATES
from raytrain_adv.data.tokens.tokenize import _encode_pieces, renderer
from tests.unit.data.tokens.template_cases import CASES
from tests.unit.data.tokens.template_tokenizer import tokenizer

Row = tuple[list[int], list[bool]]


def read_rows(file: str) -> dict[str, Row]:
    """Return ids and what is trained, by template and conversation."""
    with np.load(Path(__file__).with_name(file)) as held:
        ends = held["lengths"].cumsum()
        trained = np.unpackbits(held["trained"])[: ends[-1]].astype(bool)
        ids, marks = (np.split(array, ends[:-1]) for array in (held["ids"], trained))
        return {
            str(name): (one.tolist(), two.tolist())
            for name, one, two in zip(held["names"], ids, marks, strict=True)
        }


@cache
def expected() -> dict[str, Row]:
    """Return the rows that LLaMA-Factory makes."""
    return read_rows("template_ids.npz")


def ours(name: str, case: str, eos: str = "</s>") -> Row | str:
    """Return the row of a template here, or why it is left out."""
    messages, tools = CASES[case]
    made = tokenizer()
    made.eos_token = TEMPLATES[name].end_of_turn or eos
    try:
        pieces = renderer(made, name, None)(Conversation(messages, tools))
    except UnusableRow as error:
        return str(error)
    (row,) = _encode_pieces(made, [pieces])
    assert row is not None
    return row.ids.tolist(), row.is_answer.tolist()


def in_words(row: Row | str) -> str:
    """Return the text of a row, what is trained in brackets."""
    if isinstance(row, str):
        return row
    parts, open_ = [], False
    for token, is_answer in zip(*row, strict=True):
        parts.append(("⟦" if is_answer else "⟧") if is_answer != open_ else "")
        parts.append(tokenizer().decode([token]))
        open_ = is_answer
    return "".join(parts) + ("⟧" if open_ else "")


TOOL_CASES = {
    "tools",
    "tools and system",
    "call",
    "last is a call",
    "two calls, two results",
    "calls twice",
    "thought before a call",
}
NO_SYSTEM = TOOL_CASES - {"tools and system", "call"}
CALLS = TOOL_CASES - {"tools", "tools and system"}
THOUGHTS = {"thoughts", "thought before a call"}
TURNS = {"turns", "call", "calls twice", "thoughts", "thought before a call", "empty answer"}
TURNS |= {"unicode", "last is a call"}
EVERY = set(CASES)
GLM = "aeva glm4_moe glm4_5v glm4_7 glmz1 glm4v"
QWEN = "qwen3 qwen3_nothink qwen3_vl qwen3_vl_nothink qwen3_omni qwen3_omni_nothink qwen3_5 "
QWEN += "qwen3_5_nothink qwen3_6 keye_vl"
DIFFERENT: tuple[tuple[str, str, set[str]], ...] = (
    ("they join results by Qwen's tags, whatever the family", "*", {"two calls, two results"}),
    (
        "their history has no end token: only the label of the next message's first token is one",
        "bailing bailing_v2 breeze falcon fewshot hy_dense_1_8b hy_dense_7b index solar",
        TURNS,
    ),
    ("they train what follows the end token", "alpaca default exaone", EVERY),
    ("they end every answer twice", "gemma2", EVERY),
    ("they have no end token after calls", "youtu", CALLS),
    ("they leave the prefix out, which they name as a set", "phi_small", EVERY),
    ("they end the header of an answer by a newline after a result", "granite4", CALLS),
    ("the date here is that of the model's own template", "llama3 llama4 mllama", TOOL_CASES),
    ("without a system message the model's own template has no empty lines", QWEN, NO_SYSTEM),
    ("they leave </tool_call> out; thoughts and tools are as in the model's own", GLM, EVERY),
    ("its first token is the bos token, as in the model's own", "lfm2 lfm2_vl", EVERY),
    (
        "tools are described, and stand, as in the model's own",
        "qwen3_5 qwen3_5_nothink qwen3_6",
        TOOL_CASES,
    ),
    (
        "a newline stands before calls, and one before tools, as in the model's own",
        "minimax2",
        TOOL_CASES,
    ),
    ("thoughts end with a newline, and tools are as in the model's own", "seed_oss", EVERY),
    ("a last call ends by the token that begins its result", "glm4", {"last is a call"}),
    ("thoughts are written in the family's form", "hy3 mimo_v2 kimi_vl", THOUGHTS),
    ("they write thoughts inside the calls", "mistral_small", {"thought before a call"}),
    ("channels, tools and calls are as in the model's own template", "gpt_oss", EVERY),
    ("tools, calls and results are as in the model's own", "gemma4 gemma4n", TOOL_CASES | THOUGHTS),
)
"""Why rows here are others than LLaMA-Factory's, for which templates and conversations."""


def why_different(name: str, case: str) -> str:
    """Return why a row may be another than LLaMA-Factory's; empty if it may not."""
    for reason, names, cases in DIFFERENT:
        if case in cases and (names == "*" or name in names.split()):
            return reason
    return ""


@pytest.mark.parametrize("name", sorted({key.partition("/")[0] for key in expected()}))
def test_ids_and_labels_are_those_of_llama_factory_or_a_reason_is_listed(name: str) -> None:
    for case in CASES:
        row = expected().get(f"{name}/{case}")
        if row is not None and not why_different(name, case):
            assert in_words(ours(name, case)) == in_words(row), case
            assert ours(name, case) == row, case


def test_each_listed_reason_is_needed_in_each_template_it_names() -> None:
    for reason, names, cases in DIFFERENT:
        for name in names.split() if names != "*" else ["chatml"]:
            rows = [(case, expected().get(f"{name}/{case}")) for case in CASES if case in cases]
            differ = [case for case, row in rows if row is not None and ours(name, case) != row]
            assert differ, (reason, name)


def test_all_text_templates_of_llama_factory_are_compared() -> None:
    compared = {key.partition("/")[0] for key in expected()}
    assert set(TEMPLATES) - compared == {"chatglm3"}  # it takes a token by its name, sop


HARMONY_TOOLS = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
    "Calls to these tools must go to the commentary channel: 'functions'.<|end|>"
    "<|start|>developer<|message|># Tools\n\n## functions\n\nnamespace functions {\n\n"
    "// Add numbers\ntype add = (_: {\n// one\na: number,\n}) => any;\n\n} // namespace functions"
    "<|end|>"
)
GEMMA_TOOLS = (
    "<s><|turn>system\n<|think|>You are a helpful assistant.<|tool>declaration:add{description:"
    '<|"|>Add numbers<|"|>,parameters:{properties:{a:{description:<|"|>one<|"|>,type:<|"|>INTEGER'
    '<|"|>}},required:[<|"|>a<|"|>],type:<|"|>OBJECT<|"|>}}<tool|><turn|>\n'
)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "gpt_oss",
            HARMONY_TOOLS + "<|start|>user<|message|>Q1<|end|><|start|>assistant⟦<|channel|>"
            "analysis<|message|>T1<|end|><|start|>assistant to=functions.add<|channel|>commentary "
            'json<|message|>{"a": 1}<|call|>⟧<|start|>functions.add to=assistant<|channel|>'
            'commentary<|message|>"R1"<|end|><|start|>assistant⟦<|channel|>final<|message|>A1</s>'
            "⟧",
        ),
        (
            "gemma4",
            GEMMA_TOOLS + "<|turn>user\nQ1<turn|>\n<|turn>model\n⟦<|channel>thought\nT1<channel|>"
            "<|tool_call>call:add{a:1}<tool_call|><|tool_response>⟧response:add{value:<|\"|>R1<|\"|>}"
            "<tool_response|>⟦<|channel>thought\n<channel|>A1<turn|>\n⟧",
        ),
    ],
)  # fmt: skip
def test_calls_of_gpt_oss_and_gemma_4_are_written_as_their_own_templates_write_them(
    name: str, text: str
) -> None:
    assert in_words(ours(name, "thought before a call")) == text


def test_gpt_oss_makes_one_call_at_a_time() -> None:
    assert "one call at a time" in str(ours("gpt_oss", "two calls, two results"))
