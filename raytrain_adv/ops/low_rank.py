"""What LoRA's adapters start with: nothing (Kaiming, zero), or a weight's principal part (PiSSA).

PiSSA's adapters compute at first what the base then lacks. What they start with is kept beside
them, and so in checkpoints: the base can be reduced by just that after a restart, and an exported
adapter can take it out again.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raytrain_adv.dtensor import copy_local, gather, local_part, local_region

START = ("lora_start_A", "lora_start_B")
"""Buffers with the values that PiSSA's adapters started with."""


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear keeps its weight as [in, out], as GPT-2's Conv1D does."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def factors(layer: nn.Module, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """Return an adapter's A [rank, in] and B [out, rank]."""
    a, b = (layer.get_parameter(f"lora_{part}.{adapter}.weight") for part in "AB")
    return a, b


def start(layer: nn.Module, adapter: str, seed: int, has_magnitudes: bool) -> None:
    """Set an adapter so that it changes nothing: A uniform, B zero, DoRA's magnitudes the norms."""
    a, b = factors(layer, adapter)
    generator = torch.Generator(a.device).manual_seed(seed)
    whole = torch.empty(a.shape, dtype=torch.float32, device=a.device)
    # Source: peft's reset_lora_parameters, which follows the paper's code.
    torch.nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
    copy_local(a, whole[local_region(a)])
    copy_local(b, torch.zeros(b.shape, device=b.device)[local_region(b)])
    if has_magnitudes:
        base = layer.get_submodule("base_layer")
        weight = gather(base.get_parameter("weight"))
        axis = 0 if is_transposed(base) else 1
        norms = torch.linalg.vector_norm(weight.float(), dim=axis)
        magnitude = layer.get_parameter(f"lora_magnitude_vector.{adapter}.weight")
        copy_local(magnitude, norms[local_region(magnitude)])


def keep_start(layer: nn.Module, adapter: str) -> None:
    """Make room, without values yet, for what PiSSA's adapter starts with."""
    for name, parameter in zip(START, factors(layer, adapter), strict=True):
        layer.register_buffer(name, torch.empty_like(parameter, dtype=torch.float32))


@torch.no_grad()
def start_principal(layer: Any, adapter: str, seed: int, iterations: int) -> None:
    """Set an adapter to its weight's largest singular vectors; a collective.

    `iterations` are those of torch.svd_lowrank, -1 computes the whole decomposition. Rank 0's
    result is everyone's: GPUs of other kinds may choose other signs.
    """
    base = layer.base_layer
    weight = gather(base.weight).float()
    weight = weight.t() if is_transposed(base) else weight
    rank = layer.r[adapter]
    # Source: pissa_init of peft.tuners.lora.layer.
    if iterations < 0:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        left, values, right = left[:, :rank], values[:rank], right[:rank]
    else:
        devices = [weight.device] if weight.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            left, values, transposed = torch.svd_lowrank(weight, rank, niter=iterations)
        right = transposed.t()
    root = (values / layer.scaling[adapter]).sqrt()
    found = [(root[:, None] * right).contiguous(), (left * root).contiguous()]
    for name, parameter, whole in zip(START, factors(layer, adapter), found, strict=True):
        if dist.is_initialized():
            dist.broadcast(whole, src=0)
        copy_local(parameter, whole[local_region(parameter)])
        layer.get_buffer(name).copy_(whole)


@torch.no_grad()
def reduce_bases(model: nn.Module, adapter: str) -> None:
    """Take out of this rank's part of each base what its adapter started with, once."""
    for _, layer in started(model):
        if vars(layer).get("is_reduced"):
            continue
        weight = layer.base_layer.weight
        change = change_at_start(layer, adapter)
        change = change.t() if is_transposed(layer.base_layer) else change
        part = local_part(weight)
        copy_local(weight, part.float() - change[local_region(weight)].to(part.device))
        layer.is_reduced = True


def started(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers whose adapters PiSSA started, by fqn."""
    for fqn, module in model.named_modules():
        if START[0] in module._buffers:
            yield fqn, module


def change_at_start(layer: Any, adapter: str) -> Tensor:
    """Return what PiSSA's adapter added to the base's weight at the start: [out, in], float32."""
    a, b = (layer.get_buffer(name) for name in START)
    change: Tensor = layer.scaling[adapter] * (b @ a)
    return change


def converted(layer: Any, name: str, trained: Tensor) -> Tensor:
    """Return a trained factor, "A" or "B", with what it started with beside it, so that their
    product is the difference from the original base.
    """
    started = layer.get_buffer(f"lora_start_{name}").to(trained.device)
    return torch.cat([trained, started]) if name == "A" else torch.cat([trained, -started], dim=1)
