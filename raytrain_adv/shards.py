"""The part of a tensor that one rank holds: where it lies, writing to it, gathering the whole."""

import hashlib
import re

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

Region = tuple[slice, ...]
WRAPPERS = re.compile(r"(^|(?<=\.))(_checkpoint_wrapped_module|_orig_mod|base_layer)\.")


def plain_name(fqn: str) -> str:
    """Return a tensor's name in the plain model: without checkpoint, compile and PEFT wrappers in
    its path.
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
    local = target.to_local() if isinstance(target, DTensor) else target
    if local.numel():
        local.copy_(part)


@torch.no_grad()
def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor on every rank, on the device that computes; a collective."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    mesh, local = tensor.device_mesh, tensor.to_local()
    if local.device.type != mesh.device_type:
        # CPU offload: the shards are in host memory, the collectives run on the GPUs.
        tensor = DTensor.from_local(
            local.to(mesh.device_type),
            mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
    whole: torch.Tensor = tensor.full_tensor()
    return whole.detach()


def seed_of(seed: int, fqn: str) -> int:
    """Return the seed of one module's random values: a function of the run's seed and the module's
    name.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{fqn}".encode()).digest()[:7])
