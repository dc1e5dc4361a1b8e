"""The part of a tensor that one rank holds: where it lies, writing to it, gathering the whole."""

import hashlib
import re

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

Region = tuple[slice, ...]
WRAPPERS = re.compile(
    r"(^|(?<=\.))(_checkpoint_wrapped_module|_orig_mod|base_layer(?!\.(base_layer\.)*lora_))\."
)


def plain_name(fqn: str) -> str:
    """Return a tensor's name in the plain model: without checkpoint, compile and PEFT wrappers. An
    adapter keeps the name that PEFT's files have: several on one module are nested.
    """
    return WRAPPERS.sub("", fqn)


def local_region(tensor: torch.Tensor) -> Region:
    """Return which part of the whole tensor this rank holds, one slice per axis."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, n) for n in tensor.shape)
    sizes, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(slice(start, start + n) for start, n in zip(offsets, sizes, strict=True))


@torch.no_grad()
def copy_local(target: torch.Tensor, part: torch.Tensor) -> None:
    """Copy a rank's region of a tensor into its shard, casting to the shard's dtype and device."""
    local = local_part(target)
    if local.numel():
        local.copy_(part)


SHARDED = "shard"
"""Name of the mesh dimension over which FSDP2 shards; HSDP has another, over which it copies."""


@torch.no_grad()
def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor on every rank, on the device that computes; a collective.
    DTensor.full_tensor ends in a segmentation fault if ranks share a GPU over gloo (torch 2.11).
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    return gather_rows(tensor.to_local(), tensor)


@torch.no_grad()
def gather_rows(local: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor from this rank's rows, which lie as those of `like`; see gather."""
    if not isinstance(like, DTensor):
        return local
    mesh = like.device_mesh
    group = mesh.get_group(SHARDED)
    num_rows, num_ranks = like.shape[0], dist.get_world_size(group)
    # FSDP2 gives each rank this many rows; the last ranks have fewer, or none.
    rows = -(-num_rows // num_ranks)
    # With CPU offload the shards are in host memory, and the collectives run on the GPUs.
    padded = local.new_zeros((rows, *local.shape[1:]), device=mesh.device_type)
    padded[: local.shape[0]].copy_(local)
    whole = padded.new_empty((rows * num_ranks, *local.shape[1:]))
    dist.all_gather_into_tensor(whole, padded, group=group)
    return whole[:num_rows]


@torch.no_grad()
def global_norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the 2-norm of all ranks' parts, a float32 scalar; not by DTensor: see gather."""
    norm = torch.nn.utils.get_total_norm([local_part(t) for t in tensors], foreach=True).float()
    sharded = next((t for t in tensors if isinstance(t, DTensor)), None)
    if sharded is None:
        return norm
    squared = norm.square().to(sharded.device_mesh.device_type)
    dist.all_reduce(squared, group=sharded.device_mesh.get_group(SHARDED))
    return squared.sqrt()


def reshard(model: nn.Module) -> None:
    """Free gathered parameters, which a forward pass without a backward pass may leave."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor, of the same storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def seed_of(seed: int, fqn: str) -> int:
    """Return the seed of one module's random values, from the run's seed and the module's name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{fqn}".encode()).digest()[:7])


def raise_alike(failure: Exception | None, device: torch.device) -> None:
    """Raise rank 0's failure on every rank, if it has one; a collective: without it the other ranks
    would wait for what never comes.
    """
    box = [failure]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0, device=device)
    if box[0] is not None:
        raise box[0]


def rank() -> int:
    """Return this process's rank, 0 outside of a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks, 1 outside of a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1
