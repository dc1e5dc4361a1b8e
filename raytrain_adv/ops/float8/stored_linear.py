"""A frozen linear whose weight is held in float8 and multiplied so, as Float8Linear multiplies.

Its numbers in training are those of a frozen Float8Linear with the same weight, bit for bit; the
weight is cast once, as it is read, and not in each pass.
"""

from typing import Any

import torch
from torch import Tensor, nn

from raytrain_adv.ops.bitsandbytes.linear import PackedLinear
from raytrain_adv.ops.bitsandbytes.quantize import E4M3, Form
from raytrain_adv.ops.float8.cast import E5M2, cast, multiply, tensorwise_scale, transposed

PROBED_ROWS = 256


@torch._dynamo.allow_in_graph
class _Product(torch.autograd.Function):
    """x @ weight.t() in float8; backward transposes the weight instead of keeping a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        x_scale = tensorwise_scale(x, E4M3)
        x8 = cast(x, x_scale, E4M3)
        result: Tensor = _times(x8, weight, x_scale.reciprocal(), scale, x.dtype, backward=False)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        gradient_scale = tensorwise_scale(gradient, E5M2)
        gradient8 = cast(gradient, gradient_scale, E5M2)
        multiplier, dtype = gradient_scale.reciprocal(), gradient.dtype
        return _times(gradient8, weight, multiplier, scale, dtype, backward=True), None, None


@torch.library.custom_op("raytrain_adv::times_stored", mutates_args=())
def _times(
    left: Tensor,
    weight: Tensor,
    left_multiplier: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    backward: bool,
) -> Tensor:
    """Return left @ weight.t(), or left @ weight in backward; `weight` and `scale` are held as
    bytes, the scale of the whole weight in each row.

    An operator of its own: to view bytes as float8 torch.compile copies them, into a layout that
    float8 products do not take (torch 2.11).
    """
    weight8 = weight.view(E4M3)
    factor = transposed(weight8, left) if backward else weight8
    multiplier = scale.view(torch.float32)[0, 0]
    return multiply(left, factor, left_multiplier, multiplier, dtype, fast=not backward)


@_times.register_fake
def _(
    left: Tensor, weight: Tensor, _multiplier: Tensor, _scale: Tensor, dtype: Any, backward: bool
) -> Tensor:
    columns = weight.shape[1] * weight.element_size()
    return left.new_empty(left.shape[0], columns if backward else weight.shape[0], dtype=dtype)


class StoredFloat8Linear(PackedLinear):
    """Computes in float8 in training, and with the weight's values and unrounded inputs in
    evaluation, as the merged model does.
    """

    @property
    def temporary_bytes(self) -> int:
        """Bytes of the transposed weight, in backward."""
        return self.in_features * self.out_features

    def forward(self, input: Tensor) -> Tensor:
        """Return input @ weight.t() + bias: [..., in_features] -> [..., out_features]."""
        if not self.training:
            return super().forward(input)
        rows = input.reshape(-1, self.in_features)
        output: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            rows, self.weight, self.scale
        )
        output = output.view(*input.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias.to(output.dtype)


def distance_of_product(
    rows: int, columns: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Return the relative error of a product and its gradient, in norm, of a linear of this size
    against one that is not rounded.
    """
    from raytrain_adv.trial.compare import relative_error

    generator = torch.Generator(device).manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    with torch.device("meta"):  # without values, which would be drawn from the run's generator
        plain = nn.Linear(columns, rows, bias=False, dtype=dtype)
    stored = StoredFloat8Linear.of(plain, Form("fp8")).to_empty(device=device)
    weight, pull = numbers(rows, columns), 1e-4 * numbers(PROBED_ROWS, rows)
    stored.take(weight, device)
    x = numbers(PROBED_ROWS, columns).requires_grad_()
    with torch.enable_grad():
        value = stored.train()(x)
        (gradient,) = torch.autograd.grad(value, x, pull)
    value_error = relative_error(value.detach(), x.detach() @ weight.t())
    return value_error, relative_error(gradient, pull @ weight)


def tried(
    sizes: list[tuple[int, int]], device: torch.device, dtype: torch.dtype, most: float
) -> tuple[list[str], tuple[float, float]]:
    """Try linears of each size [out, in]; return what is wrong, and the largest errors of products
    and of gradients. On a GPU the transposes are compared in every tile they may take there.
    """
    wrong = []
    if device.type == "cuda":
        from raytrain_adv.ops.float8.cast_kernel import wrong_tiles

        wrong = wrong_tiles(dtype, device)
    errors = [distance_of_product(*size, device, dtype) for size in sizes]
    for (rows, columns), (value, gradient) in zip(sizes, errors, strict=True):
        if not max(value, gradient) < most:
            wrong.append(f"{columns} x {rows}: values off by {value:.2g}, gradients {gradient:.2g}")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    values, gradients = zip(*errors, strict=True) if errors else ((0.0,), (0.0,))
    return wrong, (max(values), max(gradients))
