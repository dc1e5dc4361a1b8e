"""A linear that rounds its weight and its adapter's product as one matrix.

One merged quantized model is then what was trained: rounding a base and an adapter apart, and their
sum again when they are merged, computes something else.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrain_adv.dtensor import plain_name
from raytrain_adv.ops.fake_quant.layers import (
    FakeQuantizedLinear,
    Scheme,
    rounded_gradients,
    rounded_product,
    rounded_weight,
)
from raytrain_adv.text import listed


def merged_weight(weight: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """Return weight + scaling * up @ down, summed in float32 and rounded once to weight's dtype.

    Args:
        weight: the base, [out, in].
        down: LoRA's A, [rank, in].
        up: LoRA's B, [out, rank].
        scaling: alpha / rank.
    """
    whole = torch.addmm(weight.float(), up.float(), down.float(), alpha=scaling)
    return whole.to(weight.dtype)


@torch._dynamo.allow_in_graph
class _MergedProduct(torch.autograd.Function):
    """rounded_product of a frozen base and its adapter; backward merges again and keeps no sum."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scaling: float,
        scheme: Scheme,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, down, up)
        ctx.scaling, ctx.scheme = scaling, scheme
        return rounded_product(x, merged_weight(weight, down, up, scaling), bias, scheme)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up = ctx.saved_tensors
        whole = merged_weight(weight, down, up, ctx.scaling)
        needed = (ctx.needs_input_grad[0], True, ctx.needs_input_grad[2])
        of_whole: Any
        grad_x, of_whole, grad_bias = rounded_gradients(x, whole, ctx.scheme, gradients[0], needed)
        of_change = of_whole.mul_(ctx.scaling)
        grad_down = (up.t().to(x.dtype) @ of_change).to(down.dtype)
        grad_up = (of_change @ down.t().to(x.dtype)).to(up.dtype)
        return grad_x, None, grad_bias, grad_down, grad_up, None, None


class FakeQuantizedMergedLinear(FakeQuantizedLinear):
    """The base of an adapted linear that computes base and adapter, rounded as one weight."""

    adapter: tuple[nn.Linear, nn.Linear, float]
    """LoRA's A and B, which belong to PEFT's layer, and their scale."""

    def join(self, layer: Any) -> None:
        """Take over the product of the one adapter of PEFT's layer, whose base this is."""
        (name,) = layer.active_adapters
        self.adapter = (layer.lora_A[name], layer.lora_B[name], float(layer.scaling[name]))
        layer.merged_adapters = [name]  # PEFT then calls the base alone

    def forward(self, input: Tensor) -> Tensor:
        """Return the output of base and adapter: [..., in_features] -> [..., out_features]."""
        down, up, scaling = self.adapter
        if not self.rounds:
            plain = F.linear(input, self.weight, self.bias)
            change: Tensor = up(down(input.to(down.weight.dtype))) * scaling
            return (plain + change).to(plain.dtype)
        output: Tensor = _MergedProduct.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, *(m.weight for m in (down, up)), scaling, self.scheme
        )
        return output


class Merging:
    """The merged weights of a model, as training computes them."""

    def __init__(
        self, model: nn.Module, gather: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> None:
        """Find the merged linears; `gather`, a collective, returns a parameter whole. Training
        computes in `dtype`.
        """
        self.bases = {
            plain_name(f"{fqn}.weight"): module
            for fqn, module in model.named_modules()
            if isinstance(module, FakeQuantizedMergedLinear)
        }
        self._gather, self._dtype = gather, dtype
        self._changed: dict[str, float] = {}

    @torch.no_grad()
    def weight(self, name: str) -> Tensor:
        """Return the merged weight [out, in] of a linear; every rank calls this."""
        base = self.bases[name]
        down, up, scaling = base.adapter
        parts = (base.weight, down.weight, up.weight)
        weight, *factors = (self._gather(part).to(self._dtype) for part in parts)
        whole = merged_weight(weight, factors[0], factors[1], scaling)
        before, after = (rounded_weight(w, *base.scheme[:2])[0] for w in (weight, whole))
        self._changed[name] = float((before != after).float().mean())
        return whole

    def describe(self) -> str:
        """Return which share of the rounded weights the adapter has changed, and which linears it
        has not changed at all; of the weights that were computed.
        """
        lost = sorted(name for name, share in self._changed.items() if share == 0)
        mean = sum(self._changed.values()) / max(1, len(self._changed))
        said = f"the adapter changes {mean:.1%} of the rounded weights"
        if lost:
            said += f"; rounding removes it wholly from {listed(lost, 3)}: train longer"
        return said
