"""Chat templates by name, laid out as LLaMA-Factory lays out those of the same name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raytrain_adv.data.read.formats import Conversation, Message, UnusableRow
from raytrain_adv.errors import JobError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOS, EOS, CONTENT = "{bos}", "{eos}", "{content}"


@dataclass(frozen=True)
class Piece:
    """A stretch of the rendered conversation."""

    text: str
    is_answer: bool


@dataclass(frozen=True)
class Template:
    """How a conversation is written down. {content}, {bos} and {eos} are replaced.

    Source: the templates of the same names in LLaMA-Factory 0.9.6
    (src/llamafactory/data/template.py), which follow the model cards of their families.
    """

    name: str
    user: str
    """A question, with the beginning of the answer."""
    assistant: str
    """An answer, with its end."""
    system: str
    tool: str | None = None
    """The result of a function call; None: cannot be written."""
    calls: Callable[[list[dict[str, Any]]], str] | None = None
    """How function calls are written inside an answer; None: they cannot be."""
    prefix: str = BOS
    default_system: str = ""
    system_in_question: bool = False
    """The system message stands inside the first question, where the model family has no system
    role."""
    end_of_turn: str = EOS
    """The token that ends an answer, and generation."""

    def pieces(self, conversation: Conversation, bos: str, eos: str) -> list[Piece]:
        """Write down a conversation.

        Raises:
            UnusableRow: if it holds function calls or tools and this template has no form for them.
        """
        if conversation.tools:
            raise UnusableRow(
                f"template {self.name} cannot describe tools; the tokenizer's own may"
            )
        messages = conversation.messages
        system = messages[0]["content"] if messages[0]["role"] == "system" else self.default_system
        turns = [m for m in messages if m["role"] != "system"]
        head = self.prefix
        if system and not self.system_in_question:
            head += self.system.replace(CONTENT, system)
        lead = self.system.replace(CONTENT, system) if system and self.system_in_question else ""
        pieces: list[Piece] = []
        for turn in turns:
            if turn["role"] == "assistant":
                pieces.append(Piece(_fill(self.assistant, self._answer(turn), bos, eos), True))
            else:
                form = self._question_form(turn)
                opening = _fill(head, "", bos, eos)
                pieces.append(Piece(opening + _fill(form, lead + turn["content"], bos, eos), False))
                head, lead = "", ""
        return pieces

    def _question_form(self, turn: Message) -> str:
        if turn["role"] == "user":
            return self.user
        if self.tool is None:
            raise UnusableRow(f"template {self.name} has no form for the result of a function call")
        return self.tool

    def _answer(self, turn: Message) -> str:
        if "tool_calls" not in turn:
            return str(turn["content"])
        if self.calls is None:
            raise UnusableRow(f"template {self.name} has no form for function calls")
        return str(turn["content"]) + self.calls([call["function"] for call in turn["tool_calls"]])

    def jinja(self, bos: str, eos: str) -> str:
        """Return the same layout as a Jinja chat template, for the model folder of the run."""

        def form(text: str, content: str) -> str:
            before, _, after = (_quoted(_fill(t, "", bos, eos)) for t in text.partition(CONTENT))
            return (
                "{{ " + (f"{before} + {content} + {after}" if CONTENT in text else before) + " }}"
            )

        content = "message['content']"
        system = form(self.system, "system")
        lead = system if self.system_in_question else ""
        parts = [
            "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else ",
            _quoted(self.default_system) + " %}",
            form(self.prefix, ""),
            "" if self.system_in_question else "{% if system %}" + system + "{% endif %}",
            "{% set lead %}{% if system %}" + lead + "{% endif %}{% endset %}",
            "{% set asked = namespace(before=false) %}",
            "{% for message in messages %}{% if message['role'] == 'user' %}",
            form(self.user, f"('' if asked.before else lead) + {content}"),
            "{% set asked.before = true %}{% elif message['role'] == 'assistant' %}",
            form(self.assistant, content),
        ]
        if self.tool:
            parts += ["{% elif message['role'] == 'tool' %}", form(self.tool, content)]
        return "".join(parts) + "{% endif %}{% endfor %}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _fill(form: str, content: str, bos: str, eos: str) -> str:
    before, middle, after = form.partition(CONTENT)
    ends = [part.replace(BOS, bos).replace(EOS, eos) for part in (before, after)]
    return ends[0] + (content if middle else "") + ends[1]


def _tagged_calls(functions: list[dict[str, Any]]) -> str:
    written = (json.dumps(f, ensure_ascii=False) for f in functions)
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in written)


def _listed_calls(functions: list[dict[str, Any]]) -> str:
    return "[TOOL_CALLS] " + json.dumps(functions, ensure_ascii=False)


def _parameter_calls(functions: list[dict[str, Any]]) -> str:
    written = [{"name": f["name"], "parameters": f["arguments"]} for f in functions]
    return json.dumps(written[0] if len(written) == 1 else written, ensure_ascii=False)


def _im(role: str) -> str:
    return f"<|im_start|>{role}\n{{content}}<|im_end|>\n"


_IM_ASKS = "<|im_start|>assistant\n"
_HEADER = "<|start_header_id|>{role}<|end_header_id|>\n\n"
_LLAMA3 = {r: _HEADER.replace("{role}", r) for r in ("system", "user", "assistant", "ipython")}
_MODEL_ASKS = "<start_of_turn>model\n"
_PHI_ASKS = "<|assistant|>\n"

TEMPLATES = {
    template.name: template
    for template in (
        Template(
            "llama3",
            user=_LLAMA3["user"] + "{content}<|eot_id|>" + _LLAMA3["assistant"],
            assistant="{content}<|eot_id|>",
            system=_LLAMA3["system"] + "{content}<|eot_id|>",
            tool=_LLAMA3["ipython"] + "{content}<|eot_id|>" + _LLAMA3["assistant"],
            calls=_parameter_calls,
            end_of_turn="<|eot_id|>",
        ),
        Template(
            "chatml",
            user=_im("user") + _IM_ASKS,
            assistant="{content}<|im_end|>\n",
            system=_im("system"),
            tool=_im("tool") + _IM_ASKS,
            prefix="",
            end_of_turn="<|im_end|>",
        ),
        Template(
            "qwen",
            user=_im("user") + _IM_ASKS,
            assistant="{content}<|im_end|>\n",
            system=_im("system"),
            tool="<|im_start|>user\n<tool_response>\n{content}\n</tool_response><|im_end|>\n"
            + _IM_ASKS,
            calls=_tagged_calls,
            prefix="",
            default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
            end_of_turn="<|im_end|>",
        ),
        Template(
            "mistral",
            user="[INST] {content}[/INST]",
            assistant=" {content}{eos}",
            system="{content}\n\n",
            tool='[TOOL_RESULTS] {"content": {content}}[/TOOL_RESULTS]',
            calls=_listed_calls,
            system_in_question=True,
        ),
        Template(
            "gemma",
            user="<start_of_turn>user\n{content}<end_of_turn>\n" + _MODEL_ASKS,
            assistant="{content}<end_of_turn>\n",
            system="{content}\n\n",
            tool="<start_of_turn>tool\n{content}<end_of_turn>\n" + _MODEL_ASKS,
            system_in_question=True,
            end_of_turn="<end_of_turn>",
        ),
        Template(
            "phi",
            user="<|user|>\n{content}<|end|>\n" + _PHI_ASKS,
            assistant="{content}<|end|>\n",
            system="<|system|>\n{content}<|end|>\n",
            prefix="",
            end_of_turn="<|end|>",
        ),
        Template(
            "alpaca",
            user="### Instruction:\n{content}\n\n### Response:\n",
            assistant="{content}{eos}\n\n",
            system="{content}",
            prefix="",
            default_system="Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n",
        ),
        Template(
            "default",
            user="Human: {content}{eos}\nAssistant:",
            assistant="{content}{eos}\n",
            system="System: {content}{eos}\n",
            prefix="",
        ),
    )
}


def find_template(name: str) -> Template:
    """Return the template of a name.

    Raises:
        JobError: if there is none.
    """
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, 1)
        hint = (
            f"did you mean {near[0]}?" if near else "leave template out to use the tokenizer's own"
        )
        raise JobError(f"Unknown template {name}", f"known: {', '.join(TEMPLATES)}", hint)
    return TEMPLATES[name]


def unfit(template: Template) -> JobError:
    """Return the error of a tokenizer that lacks the token by which a template ends answers."""
    return JobError(
        f"Template {template.name} does not fit this model's tokenizer",
        f"the tokenizer has no token {template.end_of_turn}, so answers would not end",
        "use the template of the model's family; alpaca and default need no special tokens",
    )


def no_template(model: str) -> JobError:
    """Return the error of a job that names no template, for a tokenizer that has none either."""
    return JobError(
        "The tokenizer has no chat template, and the job names none",
        f"model_name_or_path: {model}",
        f"set template to one of {', '.join(TEMPLATES)}",
    )


def adopt(tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Make a tokenizer end answers as the template does, and carry the template into the model
    folder.

    Raises:
        JobError: if the tokenizer lacks a token the template is made of.
    """
    if template.end_of_turn != EOS:
        if tokenizer.convert_tokens_to_ids(template.end_of_turn) in (None, tokenizer.unk_token_id):
            raise unfit(template)
        tokenizer.eos_token = template.end_of_turn
    if tokenizer.eos_token is None:
        raise JobError(
            f"Template {template.name} does not fit this model's tokenizer",
            "the tokenizer has no eos token",
            "give the tokenizer an eos_token in tokenizer_config.json",
        )
    written = template.jinja(tokenizer.bos_token or "", tokenizer.eos_token)
    if not _equal_on_a_probe(tokenizer, written):
        tokenizer.chat_template = written


def _equal_on_a_probe(tokenizer: PreTrainedTokenizerBase, written: str) -> bool:
    """Whether the tokenizer's own chat template, which may know tools too, writes the same text."""
    import jinja2

    if tokenizer.chat_template is None:
        return False
    texts = ("Be brief.", "One?", "Two.", "Three?", "Four.")
    roles = ("system", "user", "assistant", "user", "assistant")
    probe = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
    try:
        for messages in (probe, probe[1:3]):
            own = tokenizer.apply_chat_template(messages, tokenize=False)
            if own != tokenizer.apply_chat_template(
                messages, tokenize=False, chat_template=written
            ):
                return False
    except jinja2.TemplateError:
        return False
    return True
