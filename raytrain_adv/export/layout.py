"""How the layout that a job exports stores each tensor, and what config.json has about it."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.errors import JobError
from raytrain_adv.export.folder import write_json
from raytrain_adv.model.build import head_fqn
from raytrain_adv.model.conversion import Group
from raytrain_adv.ops.experts.find import layout_of, matrices, stacked
from raytrain_adv.ops.fake_quant import compressed_tensors
from raytrain_adv.ops.fake_quant.compressed_tensors import Scheme
from raytrain_adv.ops.fake_quant.targets import GGUF
from raytrain_adv.ops.fake_quant.torchao_config import describe_model
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.modules import is_tied, own_name
from raytrain_adv.transforms.qat import EMBEDDING, EXPERTS, Qat

Configs = Mapping[str, Any]
"""The layout's configuration of each tensor that is converted, by its name in the model: a Scheme
for compressed-tensors and GGUF, or a configuration of torchao."""
Axes = Mapping[str, int]
"""Of stacked experts, by their names: the axis of the input features."""


def is_gguf(job: JobConfig) -> bool:
    """Whether the job exports one GGUF file."""
    return job.transform(Qat).target.layout == GGUF


def why_not_exact(job: JobConfig, trained_on: torch.device, device: torch.device) -> str:
    """Return why logits need not agree bit for bit; empty if they must."""
    if device != trained_on:
        return f"{trained_on} has no room for it, and another device adds in another order"
    # Kernels are off for the comparison.
    used = [t for t in Transforms(job) if t.stage not in ("loss", "kernel")]
    exact = job.transform(Qat).exact_with
    others = [t.name for t in used if t.name not in exact]
    return f"{', '.join(others)} rounds at other places than the plain model" if others else ""


def tensor_configs(plain: PreTrainedModel, job: JobConfig) -> Configs:
    """Return the configuration of each tensor that the job's plan converts, by name."""
    qat = job.transform(Qat)
    changes = Transforms(job).plan(plain)[qat.name].changes
    configs: dict[str, Any] = {}
    for fqn, change in changes.items():
        config = qat.layer_config("" if change.after == EMBEDDING else qat.activation_dtype)
        name = own_name(fqn)
        stacks = matrices(plain.get_submodule(name)) if change.after == EXPERTS else ["weight"]
        configs |= dict.fromkeys((f"{name}.{matrix}" for matrix in stacks), config)
    return configs


def stacked_axes(plain: PreTrainedModel) -> Axes:
    """Return the axis of the input features of each stack of experts, by name."""
    axes: dict[str, int] = {}
    for fqn, module in stacked(plain).items():
        axis = 1 if (layout := layout_of(module)) and layout.is_transposed else 2
        axes |= dict.fromkeys((f"{fqn}.{name}" for name in matrices(module)), axis)
    return axes


def one_by_one(configs: Configs, axes: Axes, groups: Iterable[Group]) -> Configs:
    """Return the configurations with the names that single experts have in the checkpoint in place
    of their stacks', for engines. torchao keeps stacks. Raises JobError if the checkpoint has them
    stacked.
    """
    stacks = {name for name in configs.keys() & axes.keys() if isinstance(configs[name], Scheme)}
    own = {name: config for name, config in configs.items() if name not in stacks}
    for group in groups:
        for stack in stacks.intersection(group.targets):
            own |= dict.fromkeys((name for name, _ in group.sources), configs[stack])
            stacks.remove(stack)
    for stack in stacks:
        what = "Engines take a mixture's experts one by one"
        fix = "save the model by transformers' save_pretrained, which stores them so"
        raise JobError(what, f"{stack} is one tensor in this folder", fix)
    return own


def is_untied(plain: PreTrainedModel, configs: Configs) -> bool:
    """Whether a tied embedding is converted and its head is not: the new folder then holds both."""
    named = plain.named_parameters(remove_duplicate=False)
    return is_tied(plain) and any(p is _head(plain) for name, p in named if name in configs)


def write_config(
    source: Path,
    folder: Path,
    plain: PreTrainedModel,
    job: JobConfig,
    configs: Configs,
    dtype: torch.dtype,
) -> None:
    """Write the source's config.json with how the model is converted."""
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    linears = [f for f, m in plain.named_modules() if isinstance(m, nn.Linear)]
    qat = job.transform(Qat)
    default = qat.layer_config(qat.activation_dtype)
    if isinstance(default, Scheme):
        stems = [name.removesuffix(".weight") for name in configs]
        others = _of_mixtures(plain, configs)
        config |= compressed_tensors.describe([*linears, *others], stems, default)
    else:
        config |= describe_model(linears, configs, default)
    for part in (config, *(v for k, v in config.items() if k == "text_config")):
        if is_untied(plain, configs):
            part["tie_word_embeddings"] = False
        text = plain.config.get_text_config()
        part |= {key: getattr(text, key) for key in part if key.startswith("vocab_size")}
    write_json(config, folder / "config.json")


def _of_mixtures(plain: PreTrainedModel, configs: Configs) -> list[str]:
    """Return patterns of the names of mixtures' routers, and of experts that are not converted:
    engines have a linear for each, below the name that the checkpoint has for the mixture.
    """
    found: set[str] = set()
    for fqn, module in stacked(plain).items():
        parent, _, name = fqn.rpartition(".")
        others = plain.get_submodule(parent).named_children()
        found |= {rf"re:.*\.{n}$" for n, m in others if "weight" in m._parameters}
        if configs.keys().isdisjoint(f"{fqn}.{matrix}" for matrix in matrices(module)):
            layer = next((part for part in parent.split(".")[::-1] if part.isdigit()), "[^.]+")
            found.add(rf"re:.*\.{layer}\.(.*\.)?{name}\..*")
    return sorted(found)


def _head(plain: PreTrainedModel) -> nn.Parameter:
    return plain.get_parameter(f"{head_fqn(plain)}.weight")
