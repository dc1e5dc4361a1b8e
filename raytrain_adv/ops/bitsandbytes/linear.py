"""A frozen linear whose weight is held in 4 or 8 bits, and sharded so by FSDP2."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from raytrain_adv.dtensor import Region, copy_local, gather, gather_rows, local_part, local_region
from raytrain_adv.ops.bitsandbytes.experts import PackedStack
from raytrain_adv.ops.bitsandbytes.quantize import (
    Form,
    allocate,
    bitsandbytes,
    dequantize,
    dequantize_rows,
    distance,
    largest_of,
    quantize,
    round_scales,
    row_amax,
    spread_blocks,
    store,
    to_float8,
)
from raytrain_adv.ops.views import unalias

PROBED = (2048, 256, 192)
"""Tokens, input and output features of the product that is compared with bitsandbytes' own: enough
tokens for it to multiply as in training."""


@torch._dynamo.allow_in_graph
class _Product(torch.autograd.Function):
    """x @ weight.t() + bias; backward unpacks the weight again instead of keeping it whole."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        nested: Tensor | None,
        bias: Tensor | None,
        kind: str,
        columns: int,
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, nested)
        ctx.form = (kind, columns)
        return unalias(F.linear(x, dequantize(weight, scale, nested, kind, columns), bias))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        weight, scale, nested = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = gradient @ dequantize(weight, scale, nested, *ctx.form, gradient)
        if ctx.needs_input_grad[4]:
            grad_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
        return grad_x, None, None, None, grad_bias, None, None


class PackedLinear(nn.Linear):
    """Computes as bitsandbytes' Linear4bit bit for bit, or with the weights of its Linear8bitLt."""

    form: Form
    scale: nn.Parameter  # bytes of the scales; see dequantize for the shapes
    nested: nn.Parameter | None
    distance: Tensor | None
    """How far this rank's rows are from the originals; none before they were read."""

    @classmethod
    def of(cls, linear: nn.Linear, form: Form) -> "PackedLinear":
        """Return one for a linear of the dtype that computes, without values."""
        rows, columns = linear.out_features, linear.in_features
        with torch.device("meta"):
            new = cls(columns, rows, bias=linear.bias is not None)
        new.form, new.distance = form, None
        new.weight, new.scale, new.nested = allocate(linear.weight, form, rows, columns)
        new.bias = linear.bias
        if new.bias is not None:
            new.bias.requires_grad_(False)
        return new

    def forward(self, input: Tensor) -> Tensor:
        """Return input @ weight.t() + bias: [..., in_features] -> [..., out_features]."""
        output: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.scale, self.nested, self.bias, self.form.kind, self.in_features
        )
        return output

    @property
    def temporary_bytes(self) -> int:
        """Bytes of the weight's other form that a product makes, in training."""
        return self.in_features * self.out_features * self.weight.element_size()

    @property
    def region(self) -> Region:
        """Which part of the original weight this rank holds."""
        return local_region(self.weight)[0], slice(0, self.in_features)

    @torch.no_grad()
    def take(self, part: Tensor, device: torch.device) -> None:
        """Quantize this rank's rows into its shards; a collective in float8, or if scales are
        quantized too.

        `part` is [rows of `region`, in_features], of any dtype; `device` is where kernels round.
        """
        form, columns = self.form, self.in_features
        part = part.to(device=device, dtype=self.weight.dtype)
        packed, scale = self._rounded(part)
        used, off = scale, torch.zeros_like(scale)
        store(self.weight, packed)
        if self.nested is None:
            store(self.scale, scale.contiguous().view(torch.uint8))
        else:
            rows = self.region[0]
            whole = round_scales(gather_rows(scale, self.weight))
            rounded, outer, used, off = (whole[0][rows], whole[1], whole[2][rows], whole[3][rows])
            store(self.scale, rounded)
            nested = outer.view(self.nested.dtype)
            copy_local(self.nested, nested[local_region(self.nested)])
        held = local_part(self.weight).to(device).view(torch.uint8)
        values = dequantize_rows(held, used, form.kind, columns, part.dtype)
        self.distance = distance(part, values, scale, off, form)

    @torch.no_grad()
    def keep(self, weight: Tensor, scale: Tensor, device: torch.device) -> None:
        """Take this rank's rows as a checkpoint holds them: float8_e4m3fn [rows, in_features] and
        their float32 scales [rows, scales].
        """
        values = weight.to(device).float() * spread_blocks(scale.to(device), self.in_features)
        store(self.weight, weight.contiguous().view(torch.uint8))
        store(self.scale, scale.contiguous().view(torch.uint8))
        size = values.double().square().sum()
        self.distance = torch.stack([torch.zeros_like(size), size, torch.zeros_like(size)])

    def _rounded(self, part: Tensor) -> tuple[Tensor, Tensor]:
        if self.form.is_float8:
            # A scale is for rows of several ranks.
            rows = gather_rows(row_amax(part, self.form), self.weight)
            return to_float8(part, largest_of(rows, self.region[0], self.form))
        return quantize(part, self.form) if len(part) else _nothing(part, self.form)

    @torch.no_grad()
    def unpacked(self) -> Tensor:
        """Return the unpacked weight, whole: [out_features, in_features]; a collective."""
        nested = None if self.nested is None else gather(self.nested)
        whole: Tensor = dequantize(
            gather(self.weight), gather(self.scale), nested, self.form.kind, self.in_features
        )
        return whole


def _nothing(part: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Return what no rows are quantized to; bitsandbytes' kernels take at least one."""
    columns = part.shape[1]
    packed = part.new_empty((0, form.row_bytes(columns)), dtype=torch.uint8)
    return packed, part.new_empty((0, form.num_scales(columns)), dtype=torch.float32)


def packed_linears(model: nn.Module) -> Iterator[tuple[str, PackedLinear | PackedStack]]:
    """Yield the linears and stacks of experts that are held quantized, by fqn."""
    for fqn, module in model.named_modules():
        if isinstance(module, PackedLinear | PackedStack):
            yield fqn, module


def num_weights(module: nn.Module) -> int:
    """Return the number of weights, tied ones counted once, packed ones as what they stand for."""
    held = sum(p.numel() for p in module.parameters())
    for _, layer in packed_linears(module):
        stored = [layer.weight, layer.scale, *([layer.nested] if layer.nested is not None else [])]
        held += layer.in_features * layer.out_features - sum(p.numel() for p in stored)
    return held


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
