"""Evaluate held-out rows; up to rounding the result does not depend on the number of workers."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from raytrain_adv.data.batches.loader import Batches, MicroBatch, eval_batches
from raytrain_adv.dtensor import reshard
from raytrain_adv.ops.loss import IGNORE
from raytrain_adv.ops.loss.function import LossFunction
from raytrain_adv.run.run import Run


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Batches, size: int, loss_sum: LossFunction, run: Run
) -> dict[str, Any]:
    """Return {loss, perplexity, num_label_tokens, seconds} over all rows of `batches`.

    Ranks without rows left still run the forward pass: FSDP2 gathers on all of them.
    """
    start = time.perf_counter()
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=run.device)
    idle: MicroBatch | None = None
    for batch in eval_batches(batches, size, run.rank, run.world_size):
        idle = idle or batches.micro_batch(0, [0])
        current = (batch or idle).on(run.device)
        labels = current.labels
        loss = loss_sum(model, current.inputs, labels)
        if batch is not None:
            totals[0] += loss.double()
            totals[1] += (labels != IGNORE).sum()
    model.train()
    reshard(model)
    if run.world_size > 1:
        dist.all_reduce(totals)
    loss_total, tokens = totals.tolist()
    loss = loss_total / max(tokens, 1.0)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "num_label_tokens": int(tokens),
        "seconds": time.perf_counter() - start,
    }
