"""The model's config.json: read from its folder or the Hub, and refused if it cannot be trained."""

import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from raytrain_adv.config import JobConfig
from raytrain_adv.errors import JobError
from raytrain_adv.model.files import (
    is_local,
    model_source,
    nearest_folders,
    require_reachable,
)
from raytrain_adv.ops.stored import formats
from raytrain_adv.text import first_line

CAUSAL_CLASS = re.compile(r"CausalLM|LMHead|ConditionalGeneration")
ATTENTION_SIZES = ("num_attention_heads", "num_key_value_heads")
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", *ATTENTION_SIZES)
NUMBERS = (
    *("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "sliding_window"),
    *("max_position_embeddings", "attn_logit_softcapping", "final_logit_softcapping"),
)
POSITIVE = ("max_position_embeddings", "rms_norm_eps", "layer_norm_eps")
SHARE = re.compile(r"dropout|pdrop|drop_prob")
MOST_LAYERS = 4096  # each is built and planned: more take hours and all memory


def read_config(job: JobConfig) -> PretrainedConfig:
    """Read the model's config.json, from its folder or the Hub, and refuse what cannot be trained.
    Raises JobError when there is no such model, or it cannot be reached or trained.
    """
    raw, name = raw_config(job), model_source(job)
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise JobError(
            f"{name}: config.json does not name the kind of model",
            "no name under model_type",
            "point model_name_or_path at a Hugging Face causal language model",
        )
    refuse_kind(name, raw)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            name, trust_remote_code=job.model.trust_remote_code, **_place(job)
        )
    except Exception as error:  # a config, or the code that comes with it, may raise anything
        raise refusal_of(job, None, error) from error
    refuse_sizes(name, config)
    formats.forget(config)  # weights are read as their values, and written as such
    return config


def raw_config(job: JobConfig) -> dict[str, Any]:
    """Return what the model's config.json holds. Raises JobError when it cannot be read."""
    require_reachable(job)
    try:
        raw, _ = PretrainedConfig.get_config_dict(model_source(job), **_place(job))
    except (OSError, ValueError, TypeError, AttributeError) as error:  # the last two: no mapping
        raise unreadable(job, error) from error
    return raw


def _place(job: JobConfig) -> dict[str, str | None]:
    if is_local(job):
        return {}
    return {"revision": job.model.model_revision, "cache_dir": job.model.cache_dir}


def unreadable(job: JobConfig, error: Exception) -> JobError:
    """Return why a model's files could not be read: no such name, gated, or no connection."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    name = job.model.model_name_or_path
    if is_local(job):
        what = f"{name}: config.json cannot be read"
        return JobError(what, first_line(error), "correct config.json")
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__ or cause.__context__
    found, near = first_line(error), nearest_folders(Path(name).expanduser())
    if isinstance(cause, GatedRepoError):
        what = f"the model {name} is gated on the Hugging Face Hub"
        place = f"https://huggingface.co/{name}"
        fix = f"request access at {place}, and set HF_TOKEN on driver and workers"
    elif isinstance(cause, RepositoryNotFoundError):
        what = (
            f"there is no model {name}: neither a folder nor a repository on the Hugging Face Hub"
        )
        found = near
        fix = "correct model_name_or_path, or set HF_TOKEN if the repository is private"
    else:
        what = f"there is no folder {name}, and it could not be read from the Hugging Face Hub"
        found = f"{found}\n{near}"
        fix = "correct model_name_or_path and model_revision, or check that the Hub can be reached"
    return JobError(what, found, fix)


def refuse_kind(name: str, raw: dict[str, Any]) -> None:
    """Refuse checkpoints with rounded weights, encoder-decoders, and what is not a causal model."""
    formats.refuse_unknown(name, raw)
    named = raw.get("architectures")
    classes = [str(name) for name in named] if isinstance(named, list) else []
    lists = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    is_causal = any(
        CAUSAL_CLASS.search(c) or any(c in known.values() for known in lists) for c in classes
    )
    if raw.get("is_encoder_decoder") or (classes and not is_causal and "auto_map" not in raw):
        raise JobError(
            f"{name} is not a causal language model",
            f"config.json names {', '.join(classes) or raw['model_type']}",
            "point model_name_or_path at a decoder model (its architecture ends in ForCausalLM)",
        )


def refuse_sizes(name: str, config: PretrainedConfig) -> None:
    """Refuse a config whose sizes make no model: transformers builds some of them anyway."""
    text: Any = config.get_text_config()
    if not isinstance(text, PretrainedConfig):
        what, found = f"{name}: config.json describes no model", f"the config of its text: {text}"
        raise JobError(what, found[:200], "correct config.json")
    # Of a model whose layers differ, the sizes of its first one.
    differs = getattr(text, "is_heterogeneous", False)
    first: Any = next(iter(text.per_layer_config)) if differs else text
    sizes = {key: getattr(first, key, None) for key in SIZES}
    wrong = [f"{k}: {v}" for k, v in sizes.items() if isinstance(v, int) and v < 1]
    for key in NUMBERS:
        if isinstance(value := getattr(first, key, None), str | dict):
            wrong.append(f"{key}: {value!r:.40} is not a number")
    for key, value in first.to_dict().items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and key in POSITIVE and not value > 0:
            wrong.append(f"{key}: {value} is not positive")
        elif is_number and SHARE.search(key) and not 0 <= value <= 1:
            wrong.append(f"{key}: {value} is not a share, 0 to 1")
    if isinstance(layers := sizes["num_hidden_layers"], int) and layers > MOST_LAYERS:
        wrong.append(f"num_hidden_layers: {layers:,} is more than {MOST_LAYERS:,}")
    heads, groups = (sizes[key] for key in ATTENTION_SIZES)
    if not wrong and isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        wrong = [f"num_attention_heads: {heads} is not a multiple of num_key_value_heads: {groups}"]
    if wrong:
        what = f"{name}: config.json describes no model"
        raise JobError(what, ", ".join(wrong), "correct config.json")


def refusal_of(job: JobConfig, config: PretrainedConfig | None, error: Exception) -> JobError:
    """Turn transformers' refusal of a config or model into an error with what, found and fix."""
    name, text = job.model.model_name_or_path, str(error)
    found = first_line(error)
    if "trust_remote_code" in text:
        what = f"{name} comes with its own model code, which is not run unless you allow it"
        fix = "read that code, then set trust_remote_code: true"
    elif "Unrecognized configuration class" in text or "AutoModelForCausalLM" in text:
        kind = config.model_type if config is not None else "unknown"
        what = f"{name} is not a causal language model"
        found = f"model_type {kind} has no causal language model in transformers"
        fix = "point model_name_or_path at a causal language model"
    elif "attention" in text.lower() and job.model.flash_attn != "auto":
        what = f"{name} does not support flash_attn: {job.model.flash_attn}"
        fix = "set flash_attn: auto"
    else:
        what, found = (
            f"{name}: transformers cannot build this model",
            f"{type(error).__name__}: {found}",
        )
        fix = "check its config.json; a newer architecture may need a newer transformers"
    return JobError(what, found, fix)
