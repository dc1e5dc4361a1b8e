"""Loading the job's tokenizer, ready for the job's template."""

import hashlib
import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.tokens.templates import adopt, find_template, no_template
from raytrain_adv.errors import JobError
from raytrain_adv.model.build import read_config
from raytrain_adv.model.files import refuse_pipes


def load_tokenizer(job: JobConfig) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer; give it the job's template, and a pad token where it has none.

    Raises:
        JobError: if it cannot be loaded, does not fit the template, or has no chat template and the
            job names none.
    """
    tokenizer = _load(job)
    if job.data.template is not None:
        adopt(tokenizer, find_template(job.data.template))
    elif tokenizer.chat_template is None:
        raise no_template(job.model.model_name_or_path)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise JobError(
                "The tokenizer has neither a pad nor an eos token",
                f"model_name_or_path: {job.model.model_name_or_path}",
                "name an eos_token in its tokenizer_config.json",
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load(job: JobConfig) -> PreTrainedTokenizerBase:
    name = job.model.model_name_or_path
    folder = Path(name)
    if folder.is_dir():
        refuse_pipes(name, folder)
    try:
        loaded = AutoTokenizer.from_pretrained(
            name,
            revision=job.model.model_revision,
            cache_dir=job.model.cache_dir,
            trust_remote_code=job.model.trust_remote_code,
        )
    except Exception as error:  # whatever transformers raises on a malformed config or tokenizer
        read_config(job)  # raises the better error if the model's config is what is wrong
        inside = (
            ", ".join(sorted(p.name for p in folder.iterdir())[:8])
            if folder.is_dir()
            else "no such folder here"
        )
        raise JobError(
            f"The tokenizer of {name} could not be loaded",
            f"{inside}\n{type(error).__name__}: {error}"[:600],
            "point model_name_or_path to a folder with tokenizer.json, or to a model on the Hub",
        ) from error
    if not isinstance(loaded, PreTrainedTokenizerBase):
        raise JobError(
            f"{name} has no text tokenizer", type(loaded).__name__, "choose a causal language model"
        )
    return loaded


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash everything that decides which tokens a conversation becomes. Call it before the
    tokenizer is used."""
    if tokenizer.is_fast:
        content = tokenizer.backend_tokenizer.to_str()
    else:
        content = type(tokenizer).__name__ + json.dumps(tokenizer.get_vocab(), sort_keys=True)
    parts = [
        content,
        str(tokenizer.chat_template),
        str(tokenizer.bos_token),
        str(tokenizer.eos_token),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
