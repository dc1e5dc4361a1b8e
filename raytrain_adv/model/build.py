"""The model as an empty shape: built on the meta device from its config, without any weights."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from raytrain_adv.config import JobConfig
from raytrain_adv.errors import JobError, TrainingError
from raytrain_adv.model.attention import attention, refuse_unsupported
from raytrain_adv.model.files import (
    check_folder,
    check_weights,
    is_local,
    model_source,
    nearest_folders,
)
from raytrain_adv.model.freeze import freeze
from raytrain_adv.model.towers import is_multimodal, model_class, take_out_towers, towers
from raytrain_adv.ops.stored import formats
from raytrain_adv.text import first_line
from raytrain_adv.transforms import discover
from raytrain_adv.transforms.lora import Lora

CAUSAL_CLASS = re.compile(r"CausalLM|LMHead|ConditionalGeneration")
ATTENTION_SIZES = ("num_attention_heads", "num_key_value_heads")
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", *ATTENTION_SIZES)
MOST_LAYERS = 4096  # each is built and planned: more take hours and all memory


def build(job: JobConfig) -> PreTrainedModel:
    """Build the job's model on the meta device: parameters have shapes and dtypes, but no memory.

    Parameters are float32, or bfloat16 with pure_bf16 and for a LoRA run's frozen base in bf16.
    Tied weights are tied; the key-value cache is off; rotary tables keep float32. A multimodal
    model is of the checkpoint's own class, without the parts that text does not use.

    Raises:
        JobError: when the model cannot be read, is no causal language model, or has no weights.
    """
    model = build_whole(job)
    if is_multimodal(model):
        refuse_random_towers(job, model)
        take_out_towers(model, decoder_layers(model)[0][1])
    return model


def build_whole(job: JobConfig) -> PreTrainedModel:
    """Build the model with all of its checkpoint's parts; see build."""
    config = read_config(job)
    if not job.model.train_from_scratch:
        check_weights(job)
    config.use_cache = False
    implementation = attention(job, config)
    kind = model_class(config)
    make, keys = getattr(kind, "_from_config", None), dict[str, Any]()
    if make is None:  # an Auto class
        make, keys = kind.from_config, {"trust_remote_code": job.model.trust_remote_code}
    try:
        with torch.device("meta"):
            model: PreTrainedModel = make(
                config,
                dtype=torch.bfloat16 if job.train.computes_in_bf16 else torch.float32,
                attn_implementation=implementation,
                **keys,
            )
    except Exception as error:
        # A wrong config can raise anything in the code that reads it.
        raise refusal_of(job, config, error) from error
    model.config.use_cache = False
    set_dtypes(model, parameter_dtype(job))
    refuse_unsupported(job, model)
    freeze(model, job.train)
    model.train()
    return model


def keeps_float32(model: nn.Module) -> Callable[[str], bool]:
    """Return whether a tensor of this name is float32 in transformers, whatever the model's dtype
    (`_keep_in_fp32_modules_strict`; the list without `strict` is for float16 alone).
    """
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    pattern = re.compile("|".join(re.escape(name).replace(r"\*", ".*") for name in sorted(kept)))
    return lambda name: bool(kept) and pattern.search(name) is not None


def set_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make parameters of this dtype, and tensors float32 that transformers keeps so when it loads a
    checkpoint. Other buffers stay as they are in a model of the dtype that computes.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    keeps = keeps_float32(model)
    for fqn, module in model.named_modules():
        for name, tensor in [
            *module.named_parameters(fqn, False),
            *module.named_buffers(fqn, False),
        ]:
            if keeps(name) and tensor.is_floating_point():
                tensor.data = tensor.data.float()


def parameter_dtype(job: JobConfig) -> torch.dtype:
    """Return the dtype in which the model's own parameters are kept."""
    frozen_in_bf16 = job.train.bf16 and job.transform(Lora).enabled
    return torch.bfloat16 if job.train.pure_bf16 or frozen_in_bf16 else torch.float32


def decoder_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Return fqn and module of each transformer layer, in order: units of sharding and compiling.

    Raises:
        TrainingError: when the model has no list of layers.
    """
    names = set(model._no_split_modules or ())
    stacks = {
        fqn: [(f"{fqn}.{i}", layer) for i, layer in enumerate(module)]
        for fqn, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    kinds = {fqn: {type(layer) for _, layer in stack} for fqn, stack in stacks.items()}
    declared = [fqn for fqn in stacks if {kind.__name__ for kind in kinds[fqn]} <= names]
    candidates = declared or [fqn for fqn in stacks if len(kinds[fqn]) == 1]
    if not candidates:
        raise TrainingError(
            f"{type(model).__name__} has no list of transformer layers",
            f"lists of modules: {', '.join(stacks) or 'none'}; "
            f"layer classes it names: {sorted(names) or 'none'}",
            "train an architecture whose layers are in one torch.nn.ModuleList",
        )
    return max((stacks[fqn] for fqn in candidates), key=num_parameters)


def num_parameters(layers: list[tuple[str, nn.Module]]) -> int:
    """Return the number of parameters in all the layers."""
    return sum(p.numel() for _, layer in layers for p in layer.parameters())


def head_fqn(model: PreTrainedModel) -> str:
    """Return the fqn of the module that turns hidden states into logits."""
    untyped: Any = model
    head: nn.Module | None = untyped.get_output_embeddings()
    for fqn, module in model.named_modules():
        if module is head:
            return str(fqn)
    raise TrainingError(
        f"{type(model).__name__} has no output embeddings",
        f"modules: {', '.join(name for name, _ in model.named_children())}",
        "train a causal language model with a language-model head",
    )


def read_config(job: JobConfig) -> PretrainedConfig:
    """Read the model's config.json, from its folder or the Hub, and refuse what cannot be trained.

    Raises:
        JobError: when there is no such model, or it cannot be reached or trained.
    """
    check_folder(job)
    name, raw = model_source(job), raw_config(job)
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
    except Exception as error:
        raise refusal_of(job, None, error) from error
    refuse_sizes(name, config)
    formats.forget(config)  # weights are read as their values, and written as such
    return config


def raw_config(job: JobConfig) -> dict[str, Any]:
    """Return what the model's config.json holds.

    Raises:
        JobError: when it cannot be read.
    """
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
    """Refuse checkpoints with rounded weights, encoder-decoders, and what is no causal model."""
    for kind in discover():
        kind.refuse_checkpoint(name, raw)
    named = raw.get("architectures")
    classes = [str(name) for name in named] if isinstance(named, list) else []
    is_causal = any(CAUSAL_CLASS.search(c) for c in classes)
    if raw.get("is_encoder_decoder") or (classes and not is_causal and "auto_map" not in raw):
        raise JobError(
            f"{name} is not a causal language model",
            f"config.json names {', '.join(classes) or raw['model_type']}",
            "point model_name_or_path at a decoder model (its architecture ends in ForCausalLM)",
        )


def refuse_sizes(name: str, config: PretrainedConfig) -> None:
    """Refuse a config whose sizes make no model: transformers builds some of them anyway."""
    text: Any = config.get_text_config()
    # Of a model whose layers differ, the sizes of its first one.
    differs = getattr(text, "is_heterogeneous", False)
    first: Any = next(iter(text.per_layer_config)) if differs else text
    sizes = {key: getattr(first, key, None) for key in SIZES}
    wrong = [f"{k}: {v}" for k, v in sizes.items() if isinstance(v, int) and v < 1]
    if isinstance(layers := sizes["num_hidden_layers"], int) and layers > MOST_LAYERS:
        wrong.append(f"num_hidden_layers: {layers:,} is more than {MOST_LAYERS:,}")
    heads, groups = (sizes[key] for key in ATTENTION_SIZES)
    if not wrong and isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        wrong = [f"num_attention_heads: {heads} is not a multiple of num_key_value_heads: {groups}"]
    if wrong:
        what = f"{name}: config.json describes no model"
        raise JobError(what, ", ".join(wrong), "correct config.json")


def refuse_random_towers(job: JobConfig, model: PreTrainedModel) -> None:
    """Refuse random weights for a multimodal model: parts that text does not use stay random."""
    if job.model.train_from_scratch:
        raise JobError(
            f"{job.model.model_name_or_path} is multimodal: text alone cannot train all of it",
            f"train_from_scratch: true, and {type(model).__name__} has {towers(model)[0]}",
            "set train_from_scratch: false, or give a config of its text model",
        )


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
