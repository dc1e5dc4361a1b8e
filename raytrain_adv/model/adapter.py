"""Adapters in PEFT's files: their names there, reading them back into the shards, and merging them
into the weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.dtensor import copy_local, gather, local_region, plain_name
from raytrain_adv.errors import JobError
from raytrain_adv.model.build import build
from raytrain_adv.model.weight_files import model_folder
from raytrain_adv.model.weights import saved_tensors
from raytrain_adv.text import first_line
from raytrain_adv.transforms.lora import ADAPTER, Lora, is_adapter
from raytrain_adv.transforms.modules import names_to_store
from raytrain_adv.transforms.targets import ADAPTER_FILE, fingerprint, held_bases

PREFIX = "base_model.model."
"""Where PEFT's own wrapper keeps the model; its files carry the name."""


def base_fingerprint(job: JobConfig) -> str:
    """Return the fingerprint of the job's model, and of the adapters that are merged into it."""
    return fingerprint([model_folder(job), *map(Path, job.transform(Lora).merged)])


def frozen_fingerprint(job: JobConfig, model: nn.Module) -> str | None:
    """Return the fingerprint of what the model's frozen weights were read from, which checkpoints
    do not hold; none if it has none, or they were drawn.
    """
    is_whole = all(p.requires_grad for p in model.parameters())
    return None if is_whole or job.model.train_from_scratch else base_fingerprint(job)


def require_same_base(folder: Path, job: JobConfig) -> None:
    """Refuse a run's adapter if the model that it was trained on is another one now. Raises
    JobError. An adapter without a fingerprint tells nothing.
    """
    held = held_bases(folder)
    if held and base_fingerprint(job) not in held:
        raise changed_base(job, "the run was trained on it", folder / ADAPTER_FILE)


def changed_base(job: JobConfig, since: str, held_in: Path | str) -> JobError:
    """Return the error of a job whose model has changed since then, with the file or folder that
    belongs to the model from before.
    """
    names = ", ".join([job.model.model_name_or_path, *job.transform(Lora).merged])
    return JobError(
        f"{names} has other weights than when {since}",
        f"{held_in} belongs to those from before",
        "put the model back that was there: look into its previous/ if a run replaced it",
    )


def without_continued(job: JobConfig) -> JobConfig:
    """Return the job of a finished run without the adapter that it continued, in whose place it has
    its own; those that were merged into its model stay.
    """
    lora = job.transform(Lora)
    keys = {"adapter_name_or_path": lora.merged or None, "create_new_adapter": bool(lora.merged)}
    own = lora.model_copy(update=keys)
    return replace(job, transforms=tuple(own if t is lora else t for t in job.transforms))


def peft_names(model: PreTrainedModel) -> Callable[[str], str]:
    """Return a function: an adapter parameter's name in the model -> its name in PEFT's files.

    That function raises JobError if PEFT would not find the parameter under any name.
    """
    name_to_store = names_to_store(model)

    def peft_name(fqn: str) -> str:
        # DoRA's magnitudes keep the `.weight` that PEFT drops when it saves: PEFT reads both forms,
        # while transformers 5.17 to 5.23 does not find the dropped one and uses its own magnitudes.
        name = plain_name(fqn).replace(f".{ADAPTER}.", ".")
        stored = name_to_store(name) if ".lora_" in name else name
        if not stored:
            module, _, rest = name.partition(".lora_")
            raise JobError(
                f"PEFT would not find the adapter of {module}",
                f"transformers' mapping for {model.config.model_type} renames {module}.lora_{rest}",
                "name in lora_target the modules that get adapters, without this one",
            )
        return PREFIX + stored

    return peft_name


def trained(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return what an adapter's file holds by its names there: adapters, and modules that are
    trained in full. A tied one has both of its names: PEFT keeps a copy for each.
    """
    named = model.named_parameters(remove_duplicate=False)
    peft_name = peft_names(model)
    return {peft_name(fqn): p for fqn, p in named if p.requires_grad}


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Read a folder's adapters into this rank's shards of a model that has the same ones. Raises
    JobError if it has others, or its file cannot be read.
    """
    try:
        _load_adapter(model, folder)
    except (OSError, SafetensorError) as error:
        fix = "copy the adapter's folder again"
        raise JobError(f"{folder / ADAPTER_FILE} cannot be read", first_line(error), fix) from error


def _load_adapter(model: PreTrainedModel, folder: Path) -> None:
    ours = trained(model)
    fix = "give the folder of an adapter of this model, lora_target and additional_target"
    with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
        held = set(file.keys())
        if odd := sorted(ours.keys() ^ held):
            found = f"{len(odd)} tensors are in one of the two only, as {odd[0]}"
            raise JobError(f"{folder} has other adapters than the model", found, fix)
        for name, parameter in ours.items():
            part = file.get_slice(name)
            if (shape := tuple(part.get_shape())) != tuple(parameter.shape):  # would be broadcast
                found = f"{name} is {list(shape)}, and {list(parameter.shape)} in the model"
                raise JobError(f"{folder} has other adapters than the model", found, fix)
            copy_local(parameter, part[local_region(parameter)])


def merge_adapters(model: PreTrainedModel, job: JobConfig) -> None:
    """Merge the adapters that the job names for it into the model's weights, one after another; a
    collective. Raises JobError if one is not of this model.
    """
    for folder in job.transform(Lora).merged:
        with safe_open(Path(folder) / ADAPTER_FILE, framework="pt") as file:
            plain = build(job)
            peft_name = peft_names(plain)
            layers = _layers(plain, folder)
            held = {
                fqn: {peft_name(f"{fqn}.{name}"): name for name in _parameters(layer)}
                for fqn, layer in layers.items()
            }
            wanted = {stored for names in held.values() for stored in names}
            if odd := sorted(wanted ^ set(file.keys())):
                found = f"{len(odd)} tensors are in one of the two only, as {odd[0]}"
                fix = "merge it into its model with PEFT, and train the merged model"
                raise JobError(f"{folder} cannot be merged into this model", found, fix)
            own = saved_tensors(model)
            for fqn, layer in layers.items():
                _merge(layer, own[plain_name(f"{fqn}.weight")], file, held[fqn])


def _layers(plain: PreTrainedModel, folder: str) -> dict[str, Any]:
    """Return PEFT's layers, without values, for an adapter on a model without memory."""
    from peft import PeftConfig, inject_adapter_in_model
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    from raytrain_adv.ops.rotation import compute_indices

    config: Any = PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = False
    inject_adapter_in_model(config, plain, ADAPTER)
    compute_indices(plain)
    layers: dict[str, Any] = {
        f: m for f, m in plain.named_modules() if isinstance(m, BaseTunerLayer)
    }
    for fqn, layer in layers.items():
        if isinstance(layer, ParamWrapper) or not hasattr(layer.base_layer, "weight"):
            fix = "`raytrain-adv export RUN --output FOLDER --merge` merges the run that trained it"
            raise JobError(f"{folder} adapts stacked experts", f"as {fqn}", fix)
    return layers


def _parameters(layer: nn.Module) -> list[str]:
    """Return the names of an adapter's parameters in its layer."""
    return [name for name, _ in layer.named_parameters() if is_adapter(name)]


@torch.no_grad()
def _merge(layer: Any, weight: torch.Tensor, file: Any, names: Mapping[str, str]) -> None:
    """Write this rank's part of a weight with an adapter merged into it, by PEFT's own rule.
    `names` has for each name in the file the parameter's in the layer.
    """
    layer.base_layer = layer.base_layer.to_empty(device="cpu")
    layer.base_layer.weight = nn.Parameter(gather(weight).float().cpu())
    for stored, name in names.items():
        owner, _, last = name.rpartition(".")
        value = nn.Parameter(file.get_tensor(stored).float())
        setattr(layer.get_submodule(owner), last, value)
    layer.merge()
    copy_local(weight, layer.base_layer.weight[local_region(weight)])
