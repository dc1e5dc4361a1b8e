"""One model of a LoRA run: its adapter merged into the base that it was trained on."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raytrain_adv.config.job import JobConfig
from raytrain_adv.dtensor import plain_name
from raytrain_adv.errors import TrainingError
from raytrain_adv.export.folder import MAX_FILE_BYTES, NewFolder, folder_gib
from raytrain_adv.export.model_folder import save_tokenizer, write_model
from raytrain_adv.export.routing import compute_routed
from raytrain_adv.export.verify import (
    TOLERANCE,
    compared_tokens,
    load_folder,
    trained_logits,
)
from raytrain_adv.model.attention import attention_of_parts
from raytrain_adv.model.build import build_whole
from raytrain_adv.model.vocabulary import new_rows
from raytrain_adv.model.weight_files import CheckpointFiles, model_folder
from raytrain_adv.model.weights import match, packed_weights, saved_tensors
from raytrain_adv.ops.bitsandbytes.linear import PackedLinear
from raytrain_adv.ops.experts.adapted import merged_stacks
from raytrain_adv.transforms.lora import ADAPTED
from raytrain_adv.transforms.modules import class_name
from raytrain_adv.transforms.transform import DEFECT


@dataclass(frozen=True)
class Merged:
    """A merged model, and how it compares with the base and the adapter it was made from."""

    gib: float
    """Size on disk."""
    difference: float
    """The largest difference of a logit from the trained model's, with the same routing."""
    largest: float
    """The trained model's largest logit."""
    num_tokens: int
    """Tokens that were compared."""
    same_choice: float
    """Share of them after which the likeliest token is the same."""
    num_rerouted: int
    """Those that rounding sends through other experts; the difference is with the same ones."""
    plain_difference: float | None
    """The difference with the weights from before packing; none if the base is not packed."""


def export_merged(
    model: PreTrainedModel,
    job: JobConfig,
    out_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    way_out: str,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Merged:
    """Write one model folder, load it again, and compare its logits with the trained model's.

    A packed base is merged by its unpacked values, on which the adapter was trained. Each sum is
    computed in float32 and rounded once.

    The model is in host memory, not sharded. `out_dir` is replaced if it exists; `input_ids` are
    [tokens]; `way_out` is what a user can do when the folder cannot be written. Raises StorageError
    when the folder could not be written, and TrainingError when it does not compute what was
    trained. Nothing is left under its name.
    """
    new = NewFolder(out_dir, torch.device("cpu"), way_out)
    tokens = compared_tokens(model, input_ids)
    compared: list[Merged] = []
    write_model(merged_tensors(model), job, new, max_file_bytes)
    new.run(lambda: save_tokenizer(tokenizer, new.partial))
    new.run(lambda: compared.append(_compare(model, job, new.partial, tokens)))
    new.publish()
    return compared[0]


def merged_tensors(model: PreTrainedModel) -> Callable[[str], torch.Tensor]:
    """Return a function from a tensor's plain name to its value with the adapter merged."""
    kept = saved_tensors(model)
    adapted = {
        plain_name(f"{fqn}.base_layer.weight"): module
        for fqn, module in model.named_modules()
        if class_name(module) in ADAPTED.values()
    }
    packed, stacks = packed_weights(model), merged_stacks(model)

    def value(name: str) -> torch.Tensor:
        if name in adapted:
            return _merged(adapted[name])
        if name in stacks:
            return stacks[name]()
        return packed[name].unpacked() if name in packed else kept[name].detach()

    return value


@torch.no_grad()
def _merged(layer: Any) -> torch.Tensor:
    """Return an adapted linear's weight with the adapter in it, in float32; by PEFT's own rule."""
    base: nn.Module = layer.base_layer
    if isinstance(base, PackedLinear):
        whole: nn.Module = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        whole.weight = nn.Parameter(base.unpacked().float())
    else:
        whole = copy.deepcopy(base).float()
    layer.base_layer = whole
    layer.merge()
    layer.merged_adapters.clear()
    layer.base_layer = base
    merged: torch.Tensor = whole.get_parameter("weight").detach()
    return merged


@torch.no_grad()
def _compare(
    model: PreTrainedModel, job: JobConfig, folder: Path, input_ids: torch.Tensor
) -> Merged:
    trained = trained_logits(model, job, input_ids)
    wanted = trained.logits.float()
    attention = attention_of_parts(model)
    merged = load_folder(folder, job.model.trust_remote_code, attention).eval()
    found = compute_routed(merged, input_ids, trained, TOLERANCE)
    difference, largest = float((found.held - wanted).abs().max()), float(wanted.abs().max())
    if found.fault or not difference <= TOLERANCE * largest:
        raise TrainingError(
            "the merged model does not compute what was trained",
            found.fault
            or f"logits differ by {difference:.4g} from those of base and adapter, of which the "
            f"largest is {largest:.4g} ({input_ids.numel()} tokens)",
            f"{DEFECT}; the adapter itself can be exported without --merge",
        )
    other = None
    if packed_weights(model) and _exchange(model, job, merged):
        plain = compute_routed(merged, input_ids, trained, TOLERANCE)
        other = float((plain.held - wanted).abs().max())
    same = float((found.logits.argmax(-1) == wanted.argmax(-1)).float().mean())
    num = input_ids.numel()
    return Merged(folder_gib(folder), difference, largest, num, same, found.num_rerouted, other)


@torch.no_grad()
def _exchange(model: PreTrainedModel, job: JobConfig, merged: nn.Module) -> bool:
    """Replace packed weights by the original ones; return whether all keep their names."""
    packed = packed_weights(model)
    with CheckpointFiles(model_folder(job), new_rows(job)) as files:
        direct = match(build_whole(job), files).direct
        if not packed.keys() <= direct.keys():
            return False
        for name, layer in packed.items():
            weight = merged.get_parameter(name)
            adapter = weight.float() - layer.unpacked().float()
            weight.copy_(files.read(direct[name]).float() + adapter)
    return True
