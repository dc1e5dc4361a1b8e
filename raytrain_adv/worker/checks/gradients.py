"""Gradients: the check after the first backward pass, clipping, and the check for NaN."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from raytrain_adv.dtensor import global_norm, local_part
from raytrain_adv.errors import TrainingError
from raytrain_adv.ops.adamw import ClippingAdamW
from raytrain_adv.run.run import Run

USABLE, BROKEN, MISSING = 0, 1, 2
NAMED = 8
"""Parameters named in the message, of each kind."""


def require_all_gradients(model: nn.Module, run: Run, remedies: tuple[str, ...] = ()) -> None:
    """Check after the first backward pass that every trainable parameter has a finite gradient.

    Args:
        model: the model.
        run: this rank's run.
        remedies: what the job's features suggest if gradients are not finite.

    Raises:
        TrainingError: on all ranks, naming the parameters without one on any rank; something cut
            the graph or overflowed.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    states = torch.tensor([_state(p) for _, p in trained], dtype=torch.int64)
    if run.world_size > 1:
        dist.all_reduce(states, op=dist.ReduceOp.MAX, group=run.cpu_group)
    missing, broken = (
        [name for (name, _), state in zip(trained, states.tolist(), strict=True) if state == kind]
        for kind in (MISSING, BROKEN)
    )
    if not missing and not broken:
        return
    lines = [f"no gradient: {name}" for name in missing[:NAMED]]
    lines += [f"not finite: {name}" for name in broken[:NAMED]]
    counts = f"{len(missing)} without and {len(broken)} with a gradient that is not finite"
    raise TrainingError(
        "After the first backward pass, trainable parameters have no usable gradient",
        "\n".join([*lines, f"({counts}, of {len(trained)}, over all ranks)"]),
        "\n".join(
            [
                *(remedies if broken else ()),
                "freeze these modules, or switch off what replaced their forward pass; for values "
                "that are not finite lower learning_rate or use bf16: true",
            ]
        ),
    )


def _state(parameter: nn.Parameter) -> int:
    gradient = parameter.grad
    if gradient is None:
        return MISSING
    local = local_part(gradient)
    return USABLE if not local.numel() or bool(torch.isfinite(local).all()) else BROKEN


def clip(optimizer: torch.optim.Optimizer, max_norm: float) -> torch.Tensor:
    """Scale all gradients, at the latest in the coming step, so that their global norm is at most
    max_norm (0: do not). Return the norm before, a scalar on the device: reading it waits for the
    GPU.
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


class FiniteWatch:
    """Remembers, on the device, the first step whose loss or gradient norm was not finite.

    Args:
        device: that of training.
        remedies: returns what the job's features suggest for an optimizer step.
        keep: writes the batch of an optimizer step to disk; returns where, as a sentence.
    """

    NEVER = 2**62

    def __init__(
        self,
        device: torch.device,
        remedies: Callable[[int], tuple[str, ...]],
        keep: Callable[[int], str],
    ) -> None:
        self.remedies, self.keep = remedies, keep
        self.first_bad = torch.full((), self.NEVER, dtype=torch.int64, device=device)

    def add(self, step: int, *values: torch.Tensor) -> None:
        """Take a step's values without waiting for them."""
        finite = torch.stack([torch.isfinite(v) for v in values]).all()
        self.first_bad = torch.where(finite, self.first_bad, self.first_bad.clamp(max=step))

    def check(self) -> None:
        """Check that all values so far were finite.

        Raises:
            TrainingError: naming the first step with one that was not.
        """
        step = int(self.first_bad.item())
        if step != self.NEVER:
            fix = (
                "lower learning_rate, add warmup_ratio, check the rows of that step, or set "
                "on_bad_loss: skip; the last checkpoint is intact (resume_from_checkpoint: true)"
            )
            raise TrainingError(
                "The loss or the gradient norm is not finite",
                f"first at optimizer step {step + 1}; {self.keep(step)}",
                "\n".join([*self.remedies(step), fix]),
            )
