"""torchao's Float8Linear with scales per tensor, the same numbers by fewer passes over memory."""

from typing import Any

import torch
from torch import Tensor
from torchao.float8.float8_linear import Float8Linear as TorchaoFloat8Linear
from torchao.float8.float8_training_tensor import Float8TrainingTensor

from raytrain_adv.ops.float8.cast import (
    E4M3,
    E5M2,
    cast,
    cast_both,
    cast_transposed,
    product,
    tensorwise_scale,
    transposed,
)

PROBED_ROWS = 256


@torch._dynamo.allow_in_graph
class _Matmul(torch.autograd.Function):
    """x @ w.t() with float8 factors; backward keeps the input as its transposed cast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, trains_weight: bool) -> Tensor:
        x_scale = tensorwise_scale(x, E4M3)
        weight8, weight_scale = _factor(weight)
        if trains_weight:
            x8, x8_t = cast_both(x, x_scale, E4M3)
        else:
            x8, x8_t = cast(x, x_scale, E4M3), None
        ctx.trains_weight = trains_weight
        ctx.save_for_backward(x8_t, x_scale, weight, weight_scale)
        return product(x8, weight8, x_scale, weight_scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x8_t, x_scale, weight, weight_scale = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        scale = tensorwise_scale(gradient, E5M2)
        weight8_t, weight_scale = _transposed_factor(weight, weight_scale, after=scale)
        grad_weight = None
        if ctx.trains_weight:
            gradient8, gradient8_t = cast_both(gradient, scale, E5M2)
            grad_weight = product(gradient8_t, x8_t, scale, x_scale, weight.dtype, fast=False)
        else:
            gradient8 = cast(gradient, scale, E5M2)
        grad_x = product(gradient8, weight8_t, scale, weight_scale, gradient.dtype, fast=False)
        return grad_x, grad_weight, None


def _factor(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight in float8 and its scale; FSDP2 may have gathered it so."""
    if isinstance(weight, Float8TrainingTensor):
        return weight._data, weight._scale
    scale = tensorwise_scale(weight, E4M3)
    return cast(weight, scale, E4M3), scale


def _transposed_factor(weight: Tensor, scale: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight's transpose in float8, contiguous, and its scale; computed after `after`."""
    if isinstance(weight, Float8TrainingTensor):
        return transposed(weight._data, after), weight._scale
    return cast_transposed(weight, scale, E4M3, after), scale


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, trains_weight: bool) -> Tensor:
    """Return input @ weight.t() + bias in float8; the weight may be gathered in float8."""
    rows = input.reshape(-1, input.shape[-1])
    output: Tensor = _Matmul.apply(rows, weight, trains_weight)  # type: ignore[no-untyped-call]
    output = output.view(*input.shape[:-1], weight.shape[0])
    return output if bias is None else output + bias.to(output.dtype)


class Float8Linear(TorchaoFloat8Linear):  # type: ignore[misc] # torchao ships no types
    """A linear whose three products run in float8 with one scale per tensor.

    The numbers are those of torchao 0.18's tensorwise Float8Linear, bit for bit (tests/unit/ops,
    tests/gpu); memory is read less often.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return input @ weight.t() + bias: [..., in_features] -> [..., out_features]."""
        trains_weight = torch.is_grad_enabled() and self.weight.requires_grad
        return linear(input, self.weight, self.bias, trains_weight)


def distance(
    linear: Any, config: Any, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Return the relative error of a float8 linear's product and gradients, in norm.

    `linear` is left as it is; one that rounds its factors too is compared with one that only
    rounds. `config` is torchao's, for the classes that take one.
    """
    from raytrain_adv.ops.fake_quant.layers import FakeQuantizedLinear
    from raytrain_adv.trial.compare import relative_error

    generator = torch.Generator(device).manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    sizes = (linear.in_features, linear.out_features)
    plain = torch.nn.Linear(*sizes, bias=False, device=device, dtype=dtype)
    plain.weight.data.copy_(numbers(*plain.weight.shape))
    pair: list[Any]
    if isinstance(linear, FakeQuantizedLinear):
        pair = [kind.of(plain, *linear.scheme) for kind in (FakeQuantizedLinear, type(linear))]
    else:
        pair = [plain, type(linear).from_float(plain, config)]
    x, pull = numbers(PROBED_ROWS, sizes[0]), 1e-4 * numbers(PROBED_ROWS, sizes[1])
    results = []
    for one in pair:
        inputs = (x.clone().requires_grad_(), one.weight)
        with torch.enable_grad():
            value = one.train()(inputs[0])
            results.append([value.detach(), *torch.autograd.grad(value, inputs, pull)])
    off = [relative_error(ours, exact) for exact, ours in zip(*results, strict=True)]
    return off[0], max(off[1:])
