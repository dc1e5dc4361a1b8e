"""AdamW, and the learning rate as a pure function of the step, so that a resume changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from raytrain_adv.config.job import JobConfig
from raytrain_adv.ops.adamw import ClippingAdamW
from raytrain_adv.run.schedule import Arithmetic


def build_optimizer(model: nn.Module, job: JobConfig) -> torch.optim.Optimizer:
    """Return AdamW over the trainable parameters, without weight decay for biases and norms."""
    train = job.train
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim >= 2]
    plain = [p for p in trainable if p.ndim < 2]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decayed, train.weight_decay), (plain, 0.0))
        if params
    ]
    options: dict[str, Any] = {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "eps": train.adam_epsilon,
    }
    if train.optim == "adamw_torch_8bit":
        from torchao.optim import AdamW8bit

        optimizer: torch.optim.Optimizer = AdamW8bit(groups, **options)
        return optimizer
    kind = ClippingAdamW if train.optim == "adamw_torch_fused" else torch.optim.AdamW
    return kind(groups, **options)


def set_learning_rate(groups: Iterable[dict[str, object]], value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def learning_rate(job: JobConfig, arithmetic: Arithmetic, step: int) -> float:
    """Return the learning rate of a step (from 0), as transformers' get_scheduler does."""
    train, total, warmup = job.train, arithmetic.total_steps, arithmetic.warmup_steps
    if step < warmup:
        # As in transformers, warmup starts above 0 in one schedule.
        floor = _stable_floor(job) if train.lr_scheduler_type == "warmup_stable_decay" else 0.0
        return train.learning_rate * (floor + (1.0 - floor) * step / warmup)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return train.learning_rate * _factor(job, arithmetic, step, progress)


def _factor(job: JobConfig, arithmetic: Arithmetic, step: int, progress: float) -> float:
    kind, options = job.train.lr_scheduler_type, job.train.lr_scheduler_kwargs
    if kind in ("constant", "constant_with_warmup"):
        return 1.0
    if kind == "linear":
        return 1.0 - progress
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    if kind == "cosine":
        return cosine
    if kind == "cosine_with_min_lr":
        floor = float(options.get("min_lr_rate", 0.0))
        if "min_lr" in options:
            floor = float(options["min_lr"]) / job.train.learning_rate
        return floor + (1.0 - floor) * cosine
    floor = _stable_floor(job)
    num_decay = int(options.get("num_decay_steps", max(1, round(0.1 * arithmetic.total_steps))))
    left = arithmetic.total_steps - step
    if left >= num_decay:
        return 1.0
    decayed = 0.5 * (1.0 + math.cos(math.pi * (1.0 - left / num_decay)))
    return floor + (1.0 - floor) * decayed


def _stable_floor(job: JobConfig) -> float:
    return float(job.train.lr_scheduler_kwargs.get("min_lr_ratio", 0.0))
