"""Frozen experts whose stacked matrices are held in 4 or 8 bits, each as bitsandbytes' linear."""

from typing import Any

import torch
from torch import Tensor, nn

from raytrain_adv.dtensor import Region, gather, local_region
from raytrain_adv.ops.bitsandbytes.quantize import (
    Form,
    allocate,
    dequantize,
    dequantize_rows,
    distance,
    quantize,
    round_scales,
    store,
)
from raytrain_adv.ops.experts.find import shapes
from raytrain_adv.ops.experts.grouped import GroupedExperts, grouped


@torch._dynamo.allow_in_graph
class _Product(torch.autograd.Function):
    """Grouped product with unpacked matrices; backward unpacks them again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        nested: Tensor | None,
        ends: Tensor,
        kind: str,
        columns: int,
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, nested, ends)
        ctx.form = (kind, columns)
        return grouped(x, _unpack(weight, scale, nested, kind, columns).mT, ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, nested, ends = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        kind, columns = ctx.form
        whole = _unpack(weight, scale, nested, kind, columns, gradient)
        return grouped(gradient, whole, ends), None, None, None, None, None, None


def _unpack(
    weight: Tensor,
    scale: Tensor,
    nested: Tensor | None,
    kind: str,
    columns: int,
    after: Tensor | None = None,
) -> Tensor:
    """Return stacked matrices [expert, out, in] of their bytes."""
    flat: Tensor = dequantize(
        weight.flatten(0, 1), scale.flatten(0, 1), nested, kind, columns, after
    )
    return flat.view(*weight.shape[:2], columns)


class PackedStack(nn.Module):
    """One stack of matrices, each quantized by itself; FSDP2 shards it between experts."""

    form: Form
    shape: tuple[int, int, int]  # as in the plain model
    is_transposed: bool
    weight: nn.Parameter  # [expert, out, bytes]
    scale: nn.Parameter  # [expert, out, bytes]
    nested: nn.Parameter | None  # [expert, bytes]
    distance: Tensor | None
    """How far this rank's experts are from the originals; none before they were read."""

    @classmethod
    def of(cls, stack: nn.Parameter, form: Form, is_transposed: bool) -> "PackedStack":
        """Return one for a parameter of the dtype that computes, without values."""
        new = cls()
        count, first, second = stack.shape
        new.form, new.distance, new.is_transposed = form, None, is_transposed
        new.shape = (count, first, second)
        new.weight, new.scale, new.nested = allocate(stack, form, *new.matrix, count)
        return new

    @property
    def matrix(self) -> tuple[int, int]:
        """Output and input features of an expert."""
        _, first, second = self.shape
        return (second, first) if self.is_transposed else (first, second)

    @property
    def in_features(self) -> int:
        """Input features of each expert."""
        return self.matrix[1]

    @property
    def out_features(self) -> int:
        """Output features of all experts."""
        return self.shape[0] * self.matrix[0]

    @property
    def temporary_bytes(self) -> int:
        """Bytes of the stack that a product unpacks."""
        return self.in_features * self.out_features * self.weight.element_size()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that computes, which PEFT asks for."""
        return self.weight.dtype

    @property
    def region(self) -> Region:
        """Which part of the original this rank holds."""
        return (local_region(self.weight)[0], *(slice(0, n) for n in self.shape[1:]))

    @torch.no_grad()
    def take(self, part: Tensor, device: torch.device) -> None:
        """Quantize this rank's experts one by one; `part` is of `region`, of any dtype."""
        found = torch.zeros(3, dtype=torch.float64, device=device)
        held: dict[str, list[Tensor]] = {"weight": [], "scale": [], "nested": []}
        for expert in part:
            matrix = expert.to(device=device, dtype=self.weight.dtype)
            matrix = (matrix.t() if self.is_transposed else matrix).contiguous()
            packed, scale = quantize(matrix, self.form)
            used, off, stored = scale, torch.zeros_like(scale), scale.contiguous()
            if self.nested is not None:
                stored, outer, used, off = round_scales(scale)
                held["nested"].append(outer.view(torch.uint8))
            held["weight"].append(packed)
            held["scale"].append(stored.view(torch.uint8))
            values = dequantize_rows(packed, used, self.form.kind, self.in_features, matrix.dtype)
            one = distance(matrix, values, scale, off, self.form)
            found = torch.cat((found[:2] + one[:2], torch.maximum(found[2:], one[2:])))
        self.distance = found
        for name, values_of in held.items():
            if values_of:
                store(self.get_parameter(name), torch.stack(values_of))

    @torch.no_grad()
    def unpacked(self) -> Tensor:
        """Return the unpacked stack, whole, as in the plain model; a collective."""
        nested = None if self.nested is None else gather(self.nested)
        parts = (gather(self.weight), gather(self.scale), nested)
        whole = _unpack(*parts, self.form.kind, self.in_features)
        return whole.mT if self.is_transposed else whole


class PackedExperts(GroupedExperts):
    """Frozen experts of packed matrices, with adapters beside them."""

    packed_shapes: dict[str, tuple[int, int, int]]

    @classmethod
    def packing(cls, module: nn.Module, form: Form) -> "PackedExperts":
        """Return one for a module whose layout is known, without values."""
        new = cls.of(module)
        new.packed_shapes = shapes(module)
        for name in new.packed_shapes:
            stack = new.get_parameter(name)
            delattr(new, name)
            setattr(new, name, PackedStack.of(stack, form, new.layout.is_transposed))
        new.requires_grad_(False)
        return new

    def multiply(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        """Return x times an unpacked stacked matrix: [rows, in] -> [rows, out]."""
        held: PackedStack = getattr(self, name)
        output: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x, held.weight, held.scale, held.nested, ends, held.form.kind, held.in_features
        )
        return output
