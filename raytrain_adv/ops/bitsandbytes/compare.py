"""How far quantized weights are from the originals, and a linear from bitsandbytes' own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raytrain_adv.ops.bitsandbytes.linear import PackedLinear
from raytrain_adv.ops.bitsandbytes.quantize import Form, bitsandbytes

PROBED = (2048, 256, 192)
"""Tokens, input and output features of the product that is compared with bitsandbytes' own: enough
tokens for it to multiply as in training."""


def sum_distances(distances: list[Tensor]) -> list[list[float]]:
    """Return per layer, over all ranks, the squared difference from the originals, their squared
    norm, and the largest difference as a share of what rounding explains; a collective.
    """
    table = torch.stack(distances)
    if dist.is_initialized() and dist.get_world_size() > 1:
        sums, worst = table[:, :2].contiguous(), table[:, 2].contiguous()
        dist.all_reduce(sums)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        table = torch.cat((sums, worst[:, None]), dim=1)
    rows: list[list[float]] = table.tolist()
    return rows


def apart_from_bitsandbytes(form: Form, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return which parts of a small product differ from bitsandbytes' own: values, gradients."""
    tokens, columns, rows = PROBED
    kinds, how = bitsandbytes().nn, dict[str, Any]()
    with torch.device("meta"):  # without values, which would be drawn from the run's generator
        plain = nn.Linear(columns, rows, bias=False, dtype=dtype)
        packed = kinds.Linear4bit(columns, rows, False, dtype, form.nested, form.kind)
    with torch.device(device):
        generator = torch.Generator(device).manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=dtype, generator=generator)

        weight, x, pull = 0.02 * drawn(rows, columns), drawn(tokens, columns), drawn(tokens, rows)
        ours = PackedLinear.of(plain, form).to_empty(device=device)
        ours.take(weight, device)
        x.requires_grad_()
        values = ours(x)
        (gradient,) = torch.autograd.grad(values, x, pull)
        if form.is_int8:
            # From host memory: that is when it quantizes. Source of the rest: MatMul8bitFp.
            how |= {"requires_grad": False, "has_fp16_weights": False}
            int8 = kinds.Int8Params(weight.cpu(), **how).to(device)
            whole = int8.CB.to(dtype).mul_(int8.SCB[:, None].mul(1.0 / 127.0))
            other, back = x @ whole.t(), pull @ whole
        else:
            how |= {"compress_statistics": form.nested, "quant_type": form.kind, "module": packed}
            packed.weight = type(packed.weight)(weight, False, **how)
            other = packed.to(device)(x)
            (back,) = torch.autograd.grad(other, x, pull)
    pairs = {"values": (values, other), "gradients": (gradient, back)}
    return [name for name, (one, two) in pairs.items() if not torch.equal(one, two)]
