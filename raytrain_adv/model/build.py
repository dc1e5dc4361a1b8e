"""The model as an empty shape: built on the meta device from its config, without any weights."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from raytrain_adv.config import JobConfig
from raytrain_adv.config.training import TrainConfig
from raytrain_adv.errors import JobError, TrainingError
from raytrain_adv.model.attention import attention, refuse_unsupported
from raytrain_adv.model.config_file import read_config, refusal_of
from raytrain_adv.model.files import check_weights
from raytrain_adv.model.sequence_parallel import refuse_unsplittable
from raytrain_adv.model.towers import is_multimodal, model_class, take_out_towers, towers
from raytrain_adv.model.vocabulary import resize
from raytrain_adv.text import split_names
from raytrain_adv.transforms.lora import Lora
from raytrain_adv.transforms.modules import did_you_mean


def build(job: JobConfig) -> PreTrainedModel:
    """Build the job's model on the meta device: parameters have shapes and dtypes, but no memory.

    Parameters are float32, or bfloat16 with pure_bf16 and for a LoRA run's frozen base in bf16.
    Tied weights are tied; the key-value cache is off; rotary tables keep float32. A multimodal
    model is of the checkpoint's own class, without the parts that text does not use. Raises
    JobError when the model cannot be read, is not a causal language model, or has no weights.
    """
    model = build_whole(job)
    if is_multimodal(model):
        refuse_random_towers(job, model)
        take_out_towers(model, decoder_layers(model)[0][1])
    freeze_unreached(model)
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
    except Exception as error:  # a wrong config raises anything in the code that reads it
        raise refusal_of(job, config, error) from error
    model.config.use_cache = False
    for module in model.modules():
        if type(module).__name__ == "FalconLinear":  # computes what its parent does
            module.own_class, module.__class__ = type(module), nn.Linear  # type: ignore[assignment]
    resize(model, job)
    set_dtypes(model, parameter_dtype(job))
    refuse_unsupported(job, model)
    refuse_unsplittable(job, model)
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
    Raises TrainingError when the model has no list of layers.
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


def refuse_random_towers(job: JobConfig, model: PreTrainedModel) -> None:
    """Refuse random weights for a multimodal model: parts that text does not use stay random."""
    if job.model.train_from_scratch:
        raise JobError(
            f"{job.model.model_name_or_path} is multimodal: text alone cannot train all of it",
            f"train_from_scratch: true, and {type(model).__name__} has {towers(model)[0]}",
            "set train_from_scratch: false, or give a config of its text model",
        )


UNREACHED = re.compile(r"\.(indexer|pooler|encoder_attn|encoder_attn_layer_norm|vision_moe)\.")
"""Choices of sparse attention, which have no gradient; what encoders have for sentences; attention
to an encoder that is not there; experts of images. (tests/unit/model/test_freeze.py tries all
families.)"""
_LAYER = re.compile(r"\.(\d+)\.([^.]+)")


def freeze(model: PreTrainedModel, train: TrainConfig) -> None:
    """Freeze the parameters outside of the layers and modules that the job names, in place. Raises
    JobError if there are no such layers or modules.
    """
    count = train.freeze_trainable_layers
    if count is None:
        return
    chosen = _layers(model.config.get_text_config().num_hidden_layers, count, train.use_llama_pro)
    parameters = dict(model.named_parameters())
    places = {name: _LAYER.search(name) for name in parameters}
    inner = sorted({place[2] for place in places.values() if place})
    outer = sorted({name.split(".")[-2] for name, place in places.items() if not place})
    modules = split_names(train.freeze_trainable_modules)
    extra = split_names(train.freeze_extra_modules)
    for key, named, known in (
        ("freeze_trainable_modules", [m for m in modules if m != "all"], inner),
        ("freeze_extra_modules", extra, outer),
    ):
        for name in (name for name in named if name not in known):
            found = f"{key}: {name}; the model has {', '.join(known)}"
            fix = f"did you mean {did_you_mean(name, known)}?"
            raise JobError(f"{name} is not a module to train", found, fix)
    for name, parameter in parameters.items():
        place = places[name]
        trained = (
            int(place[1]) in chosen and ("all" in modules or place[2] in modules)
            if place
            else name.split(".")[-2] in extra
        )
        parameter.requires_grad_(trained)


def _layers(total: int, count: int, spread: bool) -> set[int]:
    """Return the layers to train: the last `count`, the first of a negative one, or with `spread`
    the last of each of `count` groups, as LLaMA Pro's.
    """
    if spread and (count < 1 or total % count):
        raise JobError(
            "use_llama_pro divides the layers into groups of one size",
            f"{total} layers, freeze_trainable_layers: {count}",
            f"give a divisor of {total}: the number of layers that were added",
        )
    if spread:
        return set(range(total // count - 1, total, total // count))
    return set(range(max(0, total - count), total) if count > 0 else range(min(-count, total)))


def freeze_unreached(model: PreTrainedModel) -> None:
    """Freeze the parameters that no gradient reaches when a decoder is trained on text. Others
    without a gradient are named by an error after the first backward pass.
    """
    for name, parameter in model.named_parameters():
        if UNREACHED.search(name):
            parameter.requires_grad_(False)
