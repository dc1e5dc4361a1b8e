"""Check that forward and backward passes leave the weights unchanged.

Of weights that FSDP2 shards it compares the shards, not the gathered weights of a pass, which are
gathered again for the next.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from raytrain_adv.dtensor import local_part, reshard
from raytrain_adv.errors import TrainingError
from raytrain_adv.run.run import Run

NAMED = 8
"""Parameters named in the message."""
CHUNK = 1 << 24
"""Numbers summed at once; on a CPU they are converted first."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def bits_of(model: nn.Module) -> torch.Tensor:
    """Return the sum of each parameter's bits on this rank, read as integers: int64, on the CPU, in
    the order of named_parameters.
    """
    reshard(model)
    sums = [_bits(p) for p in model.parameters()]
    return torch.stack([one.cpu() for one in sums]) if sums else torch.zeros(0, dtype=torch.int64)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    local: Any = local_part(tensor).detach()  # mypy would know no __tensor_flatten__ on a Tensor
    if is_traceable_wrapper_subclass(local):
        names, _ = local.__tensor_flatten__()
        return torch.stack([_bits(getattr(local, name)) for name in names]).sum()
    numbers = local.contiguous().view(-1).view(INTEGERS[local.itemsize])
    total = torch.zeros((), dtype=torch.int64, device=local.device)
    for chunk in numbers.split(CHUNK):
        total += chunk.sum(dtype=torch.int64)
    return total


def require_kept(model: nn.Module, before: torch.Tensor, run: Run) -> None:
    """Compare the weights with `before`, which bits_of returned before the forward pass.

    Raises:
        TrainingError: on all ranks, naming the parameters that changed on any.
    """
    changed = (bits_of(model) != before).to(torch.int64)
    if run.world_size > 1:
        dist.all_reduce(changed, op=dist.ReduceOp.MAX, group=run.cpu_group)
    names = [name for name, _ in model.named_parameters()]
    wrong = [name for name, one in zip(names, changed.tolist(), strict=True) if one]
    if not wrong:
        return
    raise TrainingError(
        "A forward and backward pass changed weights, which the optimizer alone may do",
        "\n".join(wrong[:NAMED]) + f"\n({len(wrong)} of {len(names)} parameters, over all ranks)",
        "something overwrites them: set torch_compile: false, or switch off use_kernels "
        "and use_liger_kernel one by one; then report it with this job",
    )
