"""Memory and values for a model that was built, prepared and sharded on the meta device.

Call materialize, then load_pretrained or init_from_scratch; every rank reads or makes exactly its
own shards. `device` is the one that computes, even if parameters live in host memory.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import guard_torch_init_functions

from raytrain_adv.config import JobConfig
from raytrain_adv.dtensor import (
    copy_local,
    local_region,
    plain_name,
    raise_alike,
    rank,
    reshard,
    seed_of,
    world_size,
)
from raytrain_adv.errors import JobError, RaytrainAdvError, TrainingError
from raytrain_adv.model.build import build, build_whole, decoder_layers
from raytrain_adv.model.conversion import Group, Route, route
from raytrain_adv.model.vocabulary import new_rows, tables
from raytrain_adv.model.weight_files import CheckpointFiles, model_folder
from raytrain_adv.ops.absent import is_absent
from raytrain_adv.ops.bitsandbytes.experts import PackedStack
from raytrain_adv.ops.bitsandbytes.linear import PackedLinear, packed_linears
from raytrain_adv.ops.float8.all_gather import as_plain

OBSOLETE = {
    "rotary_emb.inv_freq": r"rotary_emb\.inv_freq",
    "position_ids": r"(^|\.)position_ids$",
}
"""End of a buffer's name -> pattern of a checkpoint's names that transformers then ignores."""


def saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and persistent buffers by their name in the plain model, tied ones once."""
    reshard(model)
    named: dict[str, torch.Tensor] = {
        plain_name(n): as_plain(p) for n, p in model.named_parameters()
    }
    for fqn, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                named[plain_name(f"{fqn}.{name}".lstrip("."))] = buffer
    return named


def materialize(
    model: PreTrainedModel, device: torch.device, parameter_device: torch.device | None = None
) -> None:
    """Allocate a meta-device model, tie what is tied, and compute buffers that checkpoints lack.

    Buffers go to `device`, parameters to `parameter_device` if given, as with CPU offload. Raises
    TrainingError when the architecture does not define how to compute one of its buffers.
    """
    model.to_empty(device=parameter_device or device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.device != device:
                setattr(module, name, torch.empty_like(buffer, device=device))
    model.tie_weights()
    compute_buffers(model)


@torch.no_grad()
def compute_buffers(model: PreTrainedModel) -> None:
    """Compute non-persistent buffers (rotary tables) as transformers does: by `_init_weights`."""
    untouched: list[tuple[str, nn.Module, str]] = []
    with guard_torch_init_functions():
        for fqn, module, owner in owned_modules(model):
            names = [
                n
                for n, b in module.named_buffers(recurse=False)
                if n in module._non_persistent_buffers_set
            ]
            if not names:
                continue
            for name in names:
                poison(module.get_buffer(name))
            initialize_buffers(owner, module)
            untouched += [(fqn, module, n) for n in names if is_poisoned(module.get_buffer(n))]
        if untouched:  # what is around them may compute them
            for _, module, owner in owned_modules(model):
                if any(m is not module and m in set(module.modules()) for _, m, _ in untouched):
                    initialize_buffers(owner, module)
    untouched = [one for one in untouched if is_poisoned(one[1].get_buffer(one[2]))]
    if untouched:
        raise TrainingError(
            f"{type(model).__name__} does not compute all buffers that checkpoints lack",
            ", ".join(f"{fqn}.{name}" for fqn, _, name in untouched[:4]),
            "its _init_weights must set them, as transformers 5 requires of every model",
        )


def initialize_buffers(owner: PreTrainedModel, module: nn.Module) -> None:
    """Let a model compute the buffers of a module, and leave its parameters alone."""
    # transformers' initializers leave alone what carries this mark.
    kept = [t for t in module.parameters() if not hasattr(t, "_is_hf_initialized")]
    for tensor in kept:
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    initialize(owner, module)
    for tensor in kept:
        del tensor._is_hf_initialized  # type: ignore[attr-defined]


def poison(buffer: torch.Tensor) -> None:
    """Fill a buffer with a value that no computation would leave in all of it."""
    buffer.fill_(_poison(buffer.dtype))


def is_poisoned(buffer: torch.Tensor) -> bool:
    """Whether a buffer still holds what `poison` wrote."""
    if buffer.is_floating_point():
        return bool(buffer.isnan().any())
    return buffer.numel() > 0 and bool((buffer == _poison(buffer.dtype)).all())


def _poison(dtype: torch.dtype) -> float:
    if dtype.is_floating_point:
        return float("nan")
    return False if dtype is torch.bool else torch.iinfo(dtype).min


def owned_modules(
    module: nn.Module, fqn: str = "", owner: PreTrainedModel | None = None
) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
    """Yield fqn, module and the innermost model around it (whose `_init_weights` applies)."""
    if isinstance(module, PreTrainedModel):
        owner = module
    for name, child in module.named_children():
        yield from owned_modules(child, f"{fqn}.{name}".lstrip("."), owner)
    if owner is not None:
        yield fqn, module, owner


def load_pretrained(
    model: PreTrainedModel, job: JobConfig, device: torch.device
) -> CheckpointFiles:
    """Load the job's checkpoint into this rank's shards; return the files, to account for reads.

    Each rank reads its own region of tensors that keep their layout. Those that transformers fuses
    or splits are converted by rank 0, one group (at most a layer) at a time, and broadcast. Packed
    linears take their rows one by one. Parameters that a transform added are left alone. Raises
    JobError when tensors are missing, unexpected, or of another shape, listing them.
    """
    plain = build_whole(job)
    targets, packed = saved_tensors(model), packed_weights(model)
    with CheckpointFiles(model_folder(job), new_rows(job)) as files:
        found = match(plain, files)
        for name, source in found.direct.items():
            if is_absent(name, model):
                continue
            if name in packed:
                read_packed(packed[name], files, source, device)
            else:
                copy_local(targets[name], files.read(source, local_region(targets[name])))
        for group in found.groups:
            if is_absent(group.first_target, model):
                continue
            broadcast_group(group, files, plain, targets, packed, device)
    return files


def read_packed(
    layer: PackedLinear | PackedStack, files: CheckpointFiles, source: str, device: torch.device
) -> None:
    """Read this rank's part of a packed weight; what is stored in its form is kept as it is."""
    if isinstance(layer, PackedLinear) and layer.form.block:
        held = files.read_float8(source, layer.region[0], layer.form.block)
        if held is not None:
            layer.keep(*held, device)
            return
    layer.take(files.read(source, layer.region), device)


def packed_weights(model: nn.Module) -> dict[str, PackedLinear | PackedStack]:
    """Return the linears whose weights are packed, by their weights' names in the plain model."""
    return {
        plain_name(fqn if isinstance(layer, PackedStack) else f"{fqn}.weight"): layer
        for fqn, layer in packed_linears(model)
    }


def match(plain: PreTrainedModel, files: CheckpointFiles) -> Route:
    """Find for every tensor of the plain model where in the checkpoint it comes from. Raises
    JobError listing tensors that are missing, unexpected, or of another shape.
    """
    found = route(plain, files.shapes)
    join_tied(plain, files, found)
    wanted = saved_tensors(plain)
    if files.new_rows is not None:
        for name in tables(plain) & found.direct.keys():
            source, rows = found.direct[name], wanted[name].shape[0]
            if files.shapes[source][0] < rows:
                files.add_rows(source, rows)
    converted = {name for group in found.groups for name in group.targets}
    missing = sorted(wanted.keys() - found.direct.keys() - converted)
    ignored = ignored_names(plain)
    unexpected = [n for n in found.unexpected if not (ignored and ignored.search(n))]
    reshaped = [
        f"{source} is {list(files.shapes[source])}, the model has {list(wanted[name].shape)}"
        for name, source in found.direct.items()
        if files.shapes[source] != tuple(wanted[name].shape)
    ]
    integers = [
        source
        for name, source in found.direct.items()
        if wanted[name].is_floating_point() and files.holds_integers(source)
    ]
    if not (missing or unexpected or reshaped or integers):
        return found
    wrong = {"missing": missing, "unexpected": unexpected, "wrongly shaped": reshaped}
    wrong["stored as integers"] = integers
    lines = [
        f"{len(items)} {kind}: {', '.join(items[:4])}{' ...' if len(items) > 4 else ''}"
        for kind, items in wrong.items()
        if items
    ]
    raise _unfit(files, plain, "\n".join(lines))


def _unfit(
    files: CheckpointFiles, plain: PreTrainedModel, found: str, wrong: str = "do not fit"
) -> JobError:
    return JobError(
        f"the weights in {files.folder} {wrong} {type(plain).__name__}",
        found,
        "check that config.json belongs to these weights",
    )


def join_tied(plain: PreTrainedModel, files: CheckpointFiles, found: Route) -> None:
    """Keep one source for each set of tied tensors, whichever name the checkpoint uses. Raises
    JobError when the checkpoint has two different tensors that the config ties.
    """
    first: dict[int, str] = {}
    for name, parameter in plain.named_parameters(remove_duplicate=False):
        kept = first.setdefault(id(parameter), name)
        if kept == name or name not in found.direct:
            continue
        source = found.direct.pop(name)
        held = found.direct.setdefault(kept, source)
        if held != source and not torch.equal(files.read(held), files.read(source)):
            raise JobError(
                f"the config ties {name} to {kept}, but {files.folder} holds two different tensors",
                f"{source} and {held} differ",
                "set tie_word_embeddings to false in its config.json",
            )


def ignored_names(plain: PreTrainedModel) -> re.Pattern[str] | None:
    """Return the pattern of checkpoint names that the architecture ignores: old rotary tables."""
    patterns = [str(p) for p in plain._keys_to_ignore_on_load_unexpected or ()]
    for ending, pattern in OBSOLETE.items():
        if any(name.endswith(ending) for name, _ in plain.named_buffers()):
            patterns.append(pattern)
    return re.compile("|".join(f"({p})" for p in patterns)) if patterns else None


def broadcast_group(
    group: Group,
    files: CheckpointFiles,
    plain: PreTrainedModel,
    targets: dict[str, torch.Tensor],
    packed: dict[str, PackedLinear | PackedStack],
    device: torch.device,
) -> None:
    """Convert one group on rank 0, send it to all ranks, and let each take its region."""
    values: dict[str, torch.Tensor] = {}
    failure: RaytrainAdvError | None = None
    if rank() == 0:
        try:
            values = convert_group(group, files, plain)
        except RaytrainAdvError as error:
            failure = error
    raise_alike(failure, device)
    for name in group.targets:
        target = packed[name].weight if name in packed else targets[name]
        if rank() == 0:
            whole = values.pop(name).to(device=device, dtype=target.dtype).contiguous()
        else:
            whole = torch.empty(plain.get_parameter(name).shape, dtype=target.dtype, device=device)
        if world_size() > 1:
            dist.broadcast(whole, src=0)
        if name in packed:
            packed[name].take(whole[packed[name].region], device)
        else:
            copy_local(target, whole[local_region(target)])


def convert_group(
    group: Group, files: CheckpointFiles, plain: PreTrainedModel
) -> dict[str, torch.Tensor]:
    """Return a group's tensors for the model, whole, in host memory. Raises JobError when the
    conversion fails or gives other tensors than the model has.
    """
    held = ", ".join(name for name, _ in group.sources[:3])
    wanted = {name: tuple(plain.get_parameter(name).shape) for name in group.targets}
    try:
        values = group.convert(files.read, plain)
    except (RuntimeError, ValueError, IndexError, KeyError) as error:
        found = f"{held} ...: {type(error).__name__}: {error}"
        raise _unfit(files, plain, found, "cannot be converted for") from error
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    if shapes != wanted:
        raise _unfit(files, plain, f"{held} ... become {shapes}, the model has {wanted}")
    return values


def init_from_scratch(model: PreTrainedModel, job: JobConfig, device: torch.device) -> None:
    """Give a materialized model its architecture's random weights; the same on any number of ranks.

    Each module has its own seed, from the job's seed and its name. Whole tensors exist one layer at
    a time, on `device`.
    """
    plain = build(job)
    targets, packed = saved_tensors(model), packed_weights(model)
    layers = {fqn for fqn, _ in decoder_layers(plain)}
    on_gpu = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=on_gpu), torch.no_grad(), guard_torch_init_functions():
        for fqn, part, owner in list(owned_modules(plain)):
            if any(fqn.startswith(f"{layer}.") for layer in layers):
                continue  # a layer is initialized as a whole
            seed = job.train.seed
            initialize_unit(fqn, part, owner, fqn in layers, seed, device, targets, packed)


def initialize_unit(
    fqn: str,
    part: nn.Module,
    owner: PreTrainedModel,
    is_layer: bool,
    seed: int,
    device: torch.device,
    targets: dict[str, torch.Tensor],
    packed: dict[str, PackedLinear | PackedStack],
) -> None:
    """Initialize one unit's whole tensors, copy this rank's regions, and drop them again."""
    names = {name: f"{fqn}.{name}".lstrip(".") for name in part.state_dict()}
    known = targets.keys() | packed.keys()
    held = {n: full for n, full in names.items() if full in known and (is_layer or "." not in n)}
    if not held:
        return
    part.to_empty(device=device, recurse=is_layer)
    members = owned_modules(part, fqn, owner) if is_layer else [(fqn, part, owner)]
    for member_fqn, member, member_owner in members:
        # Not per layer: a parent may change what its child drew, and then continues the parent's
        # own sequence.
        torch.manual_seed(seed_of(seed, member_fqn))
        initialize(member_owner, member)
    values = part.state_dict()
    for name, full in held.items():
        if full in packed:
            packed[full].take(values[name][packed[full].region], device)
        else:
            copy_local(targets[full], values[name][local_region(targets[full])])
    part.to_empty(device="meta", recurse=is_layer)


def initialize(owner: Any, module: nn.Module) -> None:
    """Let a model give its initial values to one of its modules."""
    owner._init_weights(module)
