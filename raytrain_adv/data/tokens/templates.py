"""Chat templates by name: what families.yaml and the .jinja files of chat_templates/ compose."""

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from raytrain_adv.errors import JobError
from raytrain_adv.text import nearest

FOLDER = "chat_templates"
_THOUGHT = ("<think>\n", "\n</think>\n\n")
_DEFAULTS: dict[str, Any] = {
    "prefix": "",
    "default_system": "",
    "system": "{content}",
    "tools": "",  # stands around tools that have their own message, before that of the system
    "tools_first": False,  # in the system message, before its text
    "system_in_question": False,  # Gemma and Mistral have no system role
    "user": "{content}",
    "opening": "",  # begins an answer
    "answer": "{content}{eos}",
    "calls": "default",  # the file of calls/ that writes tools and calls
    "thought": list(_THOUGHT),
    "reasons": False,  # an answer without thoughts is written with empty ones
    "results": [
        "",
        "",
        "",
    ],  # before, between and after the results of calls that were made at once
    "results_as_json": False,
    "results_end_a_turn": True,  # Gemma 4 continues the turn in which it made the calls
    "user_token": "",  # for families whose answers end with the token of the next message
    "result_token": "",
    "end_of_turn": None,
}
_FLAGS = ("reasons", "tools_first", "system_in_question", "results_as_json", "results_end_a_turn")


@dataclass(frozen=True)
class Template:
    """A Jinja chat template in which the answers are marked.

    A question ends with the beginning of its answer, so that no generation prompt is needed.
    """

    name: str
    values: dict[str, Any]
    """As in families.yaml, completed."""

    @property
    def end_of_turn(self) -> str | None:
        """The token that ends an answer, and generation; None: the tokenizer's eos token."""
        end: str | None = self.values["end_of_turn"]
        return end

    def write(self, thinks: bool | None = True, drops_thoughts: bool = False) -> str:
        """Return the Jinja source for a job's enable_thinking.

        `thinks` False removes thoughts; None trains on those that are there. `drops_thoughts`
        leaves them out of all answers but the last.
        """
        flags = {
            "thinks_by_default": thinks,
            "drops_thoughts": drops_thoughts,
            **{name: self.values[name] for name in _FLAGS},
            "thought_has_own_form": self.values["reasons"]
            and tuple(self.values["thought"]) != _THOUGHT,
            "tools_apart": bool(self.values["tools"]),
        }
        lines = [f"{{%- set {name} = {str(value).lower()} -%}}" for name, value in flags.items()]
        lines += [f"{{%- set {name} = {_expression(v)} -%}}" for name, v in self._texts().items()]
        calls = _read(f"calls/{self.values['calls']}.jinja")
        return "\n".join([*lines, calls, _read("turns.jinja")])

    def _texts(self) -> dict[str, str]:
        values = self.values
        last = values.get("last_answer", values["answer"])
        parts = {
            "tools": values["tools"],
            "system": values["system"],
            "user": values["user"],
            "answer": values["answer"],
            "call": values.get("call", values["answer"]),
            "result": values.get("result", values["user"]),
        }
        texts = {name: values[name] for name in ("prefix", "default_system", "opening")}
        for name, text in parts.items():
            texts[f"{name}_open"], _, texts[f"{name}_close"] = text.partition("{content}")
        texts["last_close"] = last.partition("{content}")[2]
        for name in ("answer", "call", "last"):  # nothing is learned of what follows the eos token
            close, eos, after = texts[f"{name}_close"].partition("{eos}")
            texts[f"{name}_close"], texts[f"after_{name}"] = close + eos, after
        texts["thought_open"], texts["thought_close"] = values["thought"]
        texts["empty_thought"] = values.get("empty_thought", "".join(values["thought"]))
        names = ("results_open", "results_between", "results_close")
        texts |= zip(names, values["results"], strict=True)
        return {**texts, **{name: values[name] for name in ("user_token", "result_token")}}


def _expression(text: str) -> str:
    """Return the Jinja expression of a text with {bos} and {eos} in it."""
    parts = [part for part in re.split(r"(\{bos\}|\{eos\})", text) if part]
    tokens = {"{bos}": "bos_token", "{eos}": "eos_token"}
    return " ~ ".join(tokens.get(p) or json.dumps(p, ensure_ascii=False) for p in parts) or "''"


@cache
def _read(name: str) -> str:
    return (resources.files(__package__) / FOLDER / name).read_text("utf-8").rstrip("\n")


def _completed(families: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    own = families[name]
    base = _completed(families, own["like"]) if "like" in own else _DEFAULTS
    return {**base, **own}


def _templates() -> dict[str, Template]:
    families = yaml.safe_load(_read("families.yaml"))
    return {name: Template(name, _completed(families, name)) for name in families}


TEMPLATES = _templates()


def find_template(name: str) -> Template:
    """Return the template of a name. Raises JobError if there is none."""
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
