"""The text route of multimodal models: their own class, without parts that text does not use."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from raytrain_adv.errors import JobError
from raytrain_adv.ops.absent import Absent, AbsentError, absent_modules

OTHERS = (AutoModelForImageTextToText, AutoModelForMultimodalLM)
FORWARD = {"args", "kwargs", "input_ids"}
KINDS = "_kinds_of_tokens"
"""Attribute of a model that gets the kind of each token: the hook that hands it over."""


class _Reached(Exception):
    """The forward pass came to the first transformer layer."""


def model_class(config: PretrainedConfig) -> Any:
    """Return what builds a config's model: for one with a text part inside, the checkpoint's own
    class; AutoModelForCausalLM would build the text part alone for some.
    """
    if config.get_text_config() is config:
        return AutoModelForCausalLM
    for name in config.architectures or ():
        named = getattr(transformers, name, None)
        if getattr(named, "config_class", None) is type(config):
            return named
    return next(
        (auto for auto in OTHERS if type(config) in auto._model_mapping), AutoModelForCausalLM
    )


def is_multimodal(model: PreTrainedModel) -> bool:
    """Whether a model has a text part among others."""
    parts = [part for part in vars(model.config).values() if isinstance(part, PretrainedConfig)]
    return model.config.get_text_config() is not model.config and len(parts) > 1


def towers(model: PreTrainedModel) -> list[str]:
    """Return the fqn of each part beside the text part: encoders of images or sound, projectors."""
    text = _text_parts(model)

    def walk(module: nn.Module, prefix: str) -> Iterator[str]:
        for name, child in module.named_children():
            if any(child is part for part in text):
                continue
            if any(part is inner for part in text for inner in child.modules()):
                yield from walk(child, f"{prefix}{name}.")
            elif any(True for _ in child.parameters()):
                yield f"{prefix}{name}"

    return list(walk(model, ""))


def _text_parts(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """Return the decoder of text, its embeddings and its head."""
    untyped: Any = model
    found = (
        untyped.get_decoder(),
        untyped.get_input_embeddings(),
        untyped.get_output_embeddings(),
    )
    return tuple(part for part in found if part is not None)


def take_out_towers(model: PreTrainedModel, first_layer: nn.Module) -> None:
    """Replace the parts that text does not use by stand-ins without weights, and freeze what it
    uses of them; `first_layer` is the text part's. The model is on the meta device. Raises JobError
    when the model takes no text alone, or its parts cannot be told apart.
    """
    _refuse_other_inputs(model)
    parts = {fqn: model.get_submodule(fqn) for fqn in towers(model)}
    if not parts:
        raise _refusal(model, "its parts for images or sound are inside of its text part")
    for fqn, part in parts.items():
        model.set_submodule(fqn, Absent.of(fqn, part))
    while used := _used_by_text(model, first_layer):
        model.set_submodule(used, parts.pop(used).requires_grad_(False))
    text = {id(p) for part in _text_parts(model) for p in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in text:  # of no module: the share of an image's second encoder
            parameter.requires_grad_(False)


def _used_by_text(model: PreTrainedModel, first_layer: nn.Module) -> str:
    """Return a stand-in that a forward pass of text calls before its first layer; empty if none."""

    def stop(*_: Any) -> None:
        raise _Reached

    hook = first_layer.register_forward_pre_hook(stop)
    try:
        model(input_ids=torch.ones((1, 8), dtype=torch.long, device="meta"), use_cache=False)
    except _Reached:
        return ""
    except AbsentError as used:
        return str(used)
    except ValueError as error:  # its own check of what it is given
        if not _hand_kinds(model, str(error)):
            raise _refusal(model, str(error)) from error
        return _used_by_text(model, first_layer)
    except (RuntimeError, TypeError, AttributeError):
        return ""  # it needs values, which the meta device lacks: training will tell
    finally:
        hook.remove()
    return ""


def _hand_kinds(model: PreTrainedModel, wanted: str) -> bool:
    """Give a model that wants the kind of each token zeros, the kind of text; return whether it
    wants that, and has not got it yet.
    """
    accepted = inspect.signature(model.forward).parameters
    name = next((n for n in accepted if n in wanted and n.endswith("token_type_ids")), None)
    if name is None or KINDS in vars(model):
        return False

    def add(module: nn.Module, args: Any, given: dict[str, Any]) -> Any:
        ids = given.get("input_ids")
        if not module.training or ids is None or name in given:
            return None
        return args, {**given, name: torch.zeros_like(ids)}

    setattr(model, KINDS, model.register_forward_pre_hook(add, with_kwargs=True))
    return True


def _refuse_other_inputs(model: PreTrainedModel) -> None:
    accepted = inspect.signature(model.forward).parameters
    if "decoder_input_ids" in accepted:
        raise _refusal(model, "its logits are of decoder_input_ids, not of what follows input_ids")
    needed = [
        name
        for name, parameter in accepted.items()
        if parameter.default is parameter.empty and name not in FORWARD
    ]
    if needed:
        raise _refusal(model, f"its forward pass needs {', '.join(needed)}")


def _refusal(model: PreTrainedModel, found: str) -> JobError:
    return JobError(
        f"{type(model).__name__} is multimodal and cannot be trained on text alone",
        found,
        "choose a model whose text part takes text alone",
    )


def tower_notes(model: PreTrainedModel) -> Iterator[str]:
    """Yield what happens to the parts of a model that text does not use."""
    names = [fqn for fqn, _ in absent_modules(model)]
    if names:
        yield (
            f"{', '.join(names)}: frozen and not loaded, as text does not use "
            f"{'it' if len(names) == 1 else 'them'}; an exported model has the checkpoint's, byte "
            "for byte"
        )
