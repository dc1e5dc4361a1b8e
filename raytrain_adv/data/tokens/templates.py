"""Chat templates by name: Jinja files that write what LLaMA-Factory's of the same name write."""

from dataclasses import dataclass
from functools import cached_property
from importlib import resources

from raytrain_adv.errors import JobError
from raytrain_adv.text import nearest

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
