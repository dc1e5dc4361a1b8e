"""The tokenizer of the expected ids: the shipped one, with a token for every mark of a template."""

import re
from functools import cache
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.unit.data.sample_rows import TINY_LLAMA

MARK = re.compile(r"<[^<>\s{}]{2,}>|\[/?[A-Z_]+\]|\[e~\[|\]~!?b[\[\]]")
MARKS = Path(__file__).with_name("template_marks.txt")


@cache
def _made() -> PreTrainedTokenizerBase:
    made = AutoTokenizer.from_pretrained(TINY_LLAMA)
    made.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    made.add_tokens(MARKS.read_text("utf-8").split(), special_tokens=True)
    return made


def tokenizer() -> PreTrainedTokenizerBase:
    """Return the tokenizer, with its own eos token."""
    made = _made()
    made.eos_token = "</s>"
    return made
