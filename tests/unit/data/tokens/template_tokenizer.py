"""The tokenizer of the expected ids: a token for every byte and for every mark of a template.

Rows then do not depend on where texts are joined.
"""

import json
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.unit.data.sample_rows import TINY_LLAMA

MARKS = Path(__file__).with_name("template_marks.txt")


@cache
def _made() -> PreTrainedTokenizerBase:
    content = json.loads((TINY_LLAMA / "tokenizer.json").read_text("utf-8"))
    content["model"]["merges"] = []
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    made.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    made.add_tokens(MARKS.read_text("utf-8").split(), special_tokens=True)
    return made


def tokenizer() -> PreTrainedTokenizerBase:
    """Return the tokenizer, with its own eos token."""
    made = _made()
    made.eos_token = "</s>"
    return made
