"""Gradients: the check after the first backward pass, and clipping."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from raytrain_adv.dtensor import global_norm, local_part
from raytrain_adv.errors import TrainingError
from raytrain_adv.ops.adamw import ClippingAdamW
from raytrain_adv.run.run import Run

USABLE, BROKEN, MISSING = 0, 1, 2
NAMED = 8
"""Parameters named in a message, of each kind."""


def on_any_rank(run: Run, values: torch.Tensor) -> list[int]:
    """Return the largest of each value (on the CPU) over all ranks."""
    if run.world_size > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=run.cpu_group)
    found: list[int] = values.tolist()
    return found


def require_all_gradients(model: nn.Module, run: Run, remedies: tuple[str, ...] = ()) -> None:
    """Check after the first backward pass that every trainable parameter has a finite gradient;
    `remedies` are what the job's features suggest if one is not finite.

    Raises:
        TrainingError: on all ranks, naming the parameters without one on any rank; something cut
            the graph or overflowed.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    states = on_any_rank(run, torch.tensor([_state(p) for _, p in trained], dtype=torch.int64))
    missing, broken = (
        [name for (name, _), state in zip(trained, states, strict=True) if state == kind]
        for kind in (MISSING, BROKEN)
    )
    if not missing and not broken:
        return
    lines = [f"no gradient: {name}" for name in missing[:NAMED]]
    lines += [f"not finite: {name}" for name in broken[:NAMED]]
    counts = f"{len(missing)} without and {len(broken)} with a gradient that is not finite"
    fix = (
        "freeze these modules, or switch off what replaced their forward pass; for values that are "
        "not finite lower learning_rate or use bf16: true"
    )
    raise TrainingError(
        "After the first backward pass, trainable parameters have no usable gradient",
        "\n".join([*lines, f"({counts}, of {len(trained)}, over all ranks)"]),
        "\n".join([*(remedies if broken else ()), fix]),
    )


def _state(parameter: nn.Parameter) -> int:
    gradient = parameter.grad
    if gradient is None:
        return MISSING
    local = local_part(gradient)
    return USABLE if not local.numel() or bool(torch.isfinite(local).all()) else BROKEN


def clip(optimizer: torch.optim.Optimizer, max_norm: float) -> torch.Tensor:
    """Scale all gradients, at the latest in the coming step, to a global norm of at most max_norm
    (0: do not). Return the norm before, a scalar on the device.
    """
    gradients = [
        p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    norm = global_norm(gradients)
    if max_norm <= 0:
        return norm
    # Source: torch.nn.utils.clip_grads_with_norm_, which scales in a separate pass.
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    factor = factor.to(local_part(gradients[0]).device)  # the CPU with fsdp_cpu_offload
    if isinstance(optimizer, ClippingAdamW):
        optimizer.clip_factor = factor
    else:
        torch._foreach_mul_([local_part(g) for g in gradients], factor)
    return norm
