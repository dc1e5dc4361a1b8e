"""Loading the job's tokenizer, ready for the job's template."""

import hashlib
import json

import jinja2
from transformers import PreTrainedTokenizerBase

from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.tokens.limits import template_time
from raytrain_adv.data.tokens.templates import Template, find_template, no_template, unfit
from raytrain_adv.errors import JobError
from raytrain_adv.model.vocabulary import read_tokenizer


def load_tokenizer(job: JobConfig) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer; give it the job's template, and a pad token where it has none.
    Raises JobError if it cannot be loaded, does not fit the template, or has no chat template and
    the job names none.
    """
    tokenizer = read_tokenizer(job)
    if job.data.template is not None:
        source = find_template(job.data.template).write(
            job.data.enable_thinking, job.data.mask_history
        )
        adopt(tokenizer, find_template(job.data.template), source)
    elif tokenizer.chat_template is None and job.train.stage == "sft":
        raise no_template(job.model.model_name_or_path)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            found = f"model_name_or_path: {job.model.model_name_or_path}"
            fix = "name an eos_token in its tokenizer_config.json"
            raise JobError("The tokenizer has neither a pad nor an eos token", found, fix)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash everything that decides the tokens of a conversation; call it before the first use."""
    if tokenizer.is_fast:
        content = tokenizer.backend_tokenizer.to_str()
    else:
        content = type(tokenizer).__name__ + json.dumps(tokenizer.get_vocab(), sort_keys=True)
    decisive = (tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token)
    parts = [content, *map(str, decisive)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def adopt(tokenizer: PreTrainedTokenizerBase, template: Template, source: str) -> None:
    """Set the tokenizer's eos token and chat template to the template's. Raises JobError if the
    tokenizer lacks a token the template needs.
    """
    if template.end_of_turn is not None:
        if tokenizer.convert_tokens_to_ids(template.end_of_turn) in (None, tokenizer.unk_token_id):
            raise unfit(template)
        tokenizer.eos_token = template.end_of_turn
    if tokenizer.eos_token is None:
        what = f"Template {template.name} does not fit this model's tokenizer"
        fix = "give the tokenizer an eos_token in tokenizer_config.json"
        raise JobError(what, "the tokenizer has no eos token", fix)
    with template_time("of the tokenizer's own"):
        is_its_own = _writes_the_same(tokenizer, source)
    if not is_its_own:
        tokenizer.chat_template = source


def _writes_the_same(tokenizer: PreTrainedTokenizerBase, source: str) -> bool:
    """Whether the tokenizer's own chat template, which may know tools too, writes the same text."""
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
