"""Chat templates by name: Jinja files that write what LLaMA-Factory's of the same name write."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import TYPE_CHECKING

from raytrain_adv.errors import JobError
from raytrain_adv.text import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = "chat_templates"


@dataclass(frozen=True)
class Template:
    """A Jinja chat template that writes each message after the ones before it, unchanged.

    A question ends with the beginning of its answer, so that no generation prompt is needed.

    Source: the templates of the same names in LLaMA-Factory 0.9.6
    (src/llamafactory/data/template.py), which follow the model cards of their families.
    """

    name: str
    end_of_turn: str | None
    """The token that ends an answer, and generation; None: the tokenizer's eos token."""

    @cached_property
    def source(self) -> str:
        """The template's Jinja source."""
        return (resources.files(__package__) / FOLDER / f"{self.name}.jinja").read_text("utf-8")


_ENDS_OF_TURN = {
    "llama3": "<|eot_id|>", "chatml": "<|im_end|>", "qwen": "<|im_end|>", "mistral": None,
    "gemma": "<end_of_turn>", "phi": "<|end|>", "alpaca": None, "default": None,
}  # fmt: skip
TEMPLATES = {name: Template(name, end) for name, end in _ENDS_OF_TURN.items()}


def find_template(name: str) -> Template:
    """Return the template of a name.

    Raises:
        JobError: if there is none.
    """
    if name not in TEMPLATES:
        near = nearest(name, TEMPLATES)
        fix = f"did you mean {near}?" if near else "leave template out to use the tokenizer's own"
        raise JobError(f"Unknown template {name}", f"known: {', '.join(TEMPLATES)}", fix)
    return TEMPLATES[name]


def unfit(template: Template) -> JobError:
    """Return the error of a tokenizer that lacks the token by which a template ends answers."""
    found = f"the tokenizer has no token {template.end_of_turn}, so answers would not end"
    fix = "use the template of the model's family; alpaca and default need no special tokens"
    return JobError(f"Template {template.name} does not fit this model's tokenizer", found, fix)


def no_template(model: str) -> JobError:
    """Return the error of a job that names no template, for a tokenizer that has none either."""
    what = "The tokenizer has no chat template, and the job names none"
    fix = f"set template to one of {', '.join(TEMPLATES)}"
    return JobError(what, f"model_name_or_path: {model}", fix)


def adopt(tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Set the tokenizer's eos token and chat template to the template's.

    Raises:
        JobError: if the tokenizer lacks a token the template needs.
    """
    if template.end_of_turn is not None:
        if tokenizer.convert_tokens_to_ids(template.end_of_turn) in (None, tokenizer.unk_token_id):
            raise unfit(template)
        tokenizer.eos_token = template.end_of_turn
    if tokenizer.eos_token is None:
        what = f"Template {template.name} does not fit this model's tokenizer"
        fix = "give the tokenizer an eos_token in tokenizer_config.json"
        raise JobError(what, "the tokenizer has no eos token", fix)
    if not _writes_the_same(tokenizer, template.source):
        tokenizer.chat_template = template.source


def _writes_the_same(tokenizer: PreTrainedTokenizerBase, source: str) -> bool:
    """Whether the tokenizer's own chat template, which may know tools too, writes the same text."""
    import jinja2

    if tokenizer.chat_template is None:
        return False
    texts = ("Be brief.", "One?", "Two.", "Three?", "Four.")
    roles = ("system", "user", "assistant", "user", "assistant")
    sample = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
    try:
        return all(
            tokenizer.apply_chat_template(messages, tokenize=False)
            == tokenizer.apply_chat_template(messages, tokenize=False, chat_template=source)
            for messages in (sample, sample[1:3])
        )
    except jinja2.TemplateError:
        return False
