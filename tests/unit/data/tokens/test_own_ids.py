"""Ids and labels of fourteen conversations in the models' own chat templates.

own_ids.npz was made by rendering with the chat templates of the models that are named in its keys,
as data/tokens/own_template.py does without `template`, with the tokenizer of
template_tokenizer.py; their dates and end tokens are replaced. A conversation that a model's
template cannot write has no row.
"""

from __future__ import annotations

import re

import pytest

from tests.unit.data.tokens.template_cases import CASES
from tests.unit.data.tokens.test_template_ids import (
    EVERY,
    TOOL_CASES,
    in_words,
    ours,
    read_rows,
)

ROWS = read_rows("own_ids.npz")
EMPTY = re.compile(r"</?think>\n{0,2}|<seed:think></seed:think>\n|<\|channel>thought\n<channel\|>")
REASONING = "qwen3 qwen3_5 qwen3_6 qwen3_5_nothink mimo_vl minimax2 seed_oss deepseekr1 glm4_7"
NO_SYSTEM = EVERY - {"system", "turns", "tools and system", "call"}
PLAIN = EVERY - TOOL_CASES
EOS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "exaone": "[|endofturn|]",
    "granite3": "<|end_of_text|>",
}
DIFFERENT: tuple[tuple[str, str, set[str]], ...] = (
    (
        "thoughts of earlier answers are kept, as LLaMA-Factory does; mask_history leaves them out",
        "qwen3, qwen3_5, qwen3_6, qwen3_5_nothink, glm4_moe, glm4_7, minimax2, gpt_oss",
        {"thoughts"},
    ),
    (
        "spaces at the ends of a text are kept; the model's own strips them",
        "gemma2, gemma3, gemma3n, glm4_moe, glm4_7, qwen3_5, qwen3_6, qwen3_5_nothink, seed_oss, "
        "cohere, llama3 (Meta-Llama-3-8B)",
        {"very long"},
    ),
    (
        "the default system message is LLaMA-Factory's, or none",
        "smollm2, granite3, granite4, lfm2, intern2, moonlight, phi4, mistral_small, ministral3, "
        "minimax2, zephyr, vicuna, deepseekcoder, exaone",
        NO_SYSTEM,
    ),
    (
        "dates and settings are written only with `template` left out",
        "llama3 (Llama-3.1-8B), mllama, gpt_oss, smollm",
        EVERY,
    ),
    ("tools stand in the system message, not in the question", "llama4", TOOL_CASES),
    (
        "LLaMA-Factory writes tools and calls of this family in its default form",
        "granite3, granite4, falcon_h1, moonlight",
        TOOL_CASES,
    ),
    (
        "tools stand in the first question, as LLaMA-Factory writes them; in the model's own they "
        "stand in the last one, and calls have ids",
        "mistral, ministral, ministral3, mistral_small",
        TOOL_CASES,
    ),
    (
        "the system message stands in the question, as LLaMA-Factory's",
        "ministral3",
        {"system", "turns"},
    ),
    ("it has spaces around the tags that LLaMA-Factory leaves out", "mistral", PLAIN),
    ("an answer begins, or ends, with a space", "deepseek, openchat, llama2, vicuna", EVERY),
    ("it ends the last answer with a second token", "phi, intern2", EVERY),
    ("it ends earlier answers with no token", "solar", {"turns", "thoughts", "unicode"}),
    ("it ends turns with a newline that LLaMA-Factory leaves out", "zephyr, vicuna", EVERY),
    ("the newline after an answer has no loss here", "exaone", EVERY),
    ("the newline before an answer is LLaMA-Factory's to learn", "deepseekcoder", EVERY),
    ("its first token is the tokenizer's bos token", "phi_small", EVERY),
    ("it has no newline before an empty answer", "glm4_moe", {"empty answer"}),
    (
        "LLaMA-Factory has no empty line between a thought in the text and a call",
        "qwen, qwen3_nothink, qwen3_vl_nothink, mimo_vl",
        {"thought before a call"},
    ),
    (
        "it has a newline before the system message, whose default is LLaMA-Factory's, no empty "
        "thoughts, and no form for thoughts in the text",
        "gemma4, gemma4n",
        EVERY,
    ),
)
"""Why rows here are others than those of the models' own templates."""


def why_different(name: str, case: str) -> str:
    """Return why a row may be another than in the model's own template; empty if it may not."""
    template = name.partition(" ")[0]
    for reason, names, cases in DIFFERENT:
        if case in cases and (names == "*" or {template, name} & set(names.split(", "))):
            return reason
    return ""


def both(name: str, case: str) -> tuple[str, str]:
    """Return the row here, and the row of the model's own template."""
    template = name.partition(" ")[0]
    here = in_words(ours(template, case, EOS.get(template, "</s>")))
    there = in_words(ROWS[f"{name}/{case}"])
    if template in REASONING.split():  # empty thoughts are LLaMA-Factory's
        return without_empty_thoughts(here), without_empty_thoughts(there)
    return here, there


def without_empty_thoughts(row: str) -> str:
    return EMPTY.sub("", row.replace("⟦", "").replace("⟧", ""))


NAMES = sorted({key.rpartition("/")[0] for key in ROWS})


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_labels_are_those_of_the_models_own_template_or_a_reason_is_listed(name):
    for case in CASES:
        if f"{name}/{case}" in ROWS and not why_different(name, case):
            here, there = both(name, case)
            assert here == there, case


def test_each_listed_reason_is_needed_in_each_template_it_names():
    for reason, templates, cases in DIFFERENT:
        for listed in templates.split(", "):
            names = [name for name in NAMES if listed in (name, name.partition(" ")[0])]
            rows = [(n, c) for n in names for c in cases if f"{n}/{c}" in ROWS]
            differ = [row for row in rows if len(set(both(*row))) == 2]
            assert differ, (reason, listed)
