"""Liger's kernels as operators, whose writes torch.compile need not guess.

torch.compile reads a Triton kernel to find what it writes to. On kernels that take a number, as a
norm's epsilon, that fails, and every given tensor counts as written to (torch 2.11, liger-kernel
0.8.5: triton_kernel_wrap.py, identify_mutated_tensors). A norm's weight, kept for backward, then
looks like a private tensor: on an H100 backward wrote the gradient over the weight.
"""

from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op("raytrain_adv::liger_rms_norm", mutates_args=())
def _rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, cast: str, rows: bool
) -> Pair:
    from liger_kernel.ops.rms_norm import rms_norm_forward

    out, _, rstd, *_ = rms_norm_forward(x.contiguous(), weight, eps, offset, cast, rows)
    return out, rstd


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float, offset: float, cast: str, rows: bool) -> Pair:
    num_rows = x.numel() // x.shape[-1]
    dtype = x.dtype if cast == "none" else torch.float32
    return x.new_empty(x.shape), x.new_empty(num_rows, dtype=dtype)


@torch.library.custom_op("raytrain_adv::liger_rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    cast: str,
    rows: bool,
    trains_weight: bool,
) -> Pair:
    from liger_kernel.ops import rms_norm
    from liger_kernel.ops.utils import calculate_settings

    block, num_warps = calculate_settings(x.shape[-1])
    dx, dw = rms_norm.rms_norm_backward(
        gradient.contiguous(),
        x.contiguous().view(-1, x.shape[-1]),
        weight,
        rstd,
        offset,
        rms_norm._str_to_casting_mode[cast],
        block,
        num_warps,
        False,  # not in place: the gradient may be wanted elsewhere
        rows,
        trains_weight,
    )
    return dx, x.new_empty(0) if dw is None else dw


@_rms_norm_backward.register_fake
def _(gradient: Tensor, x: Tensor, weight: Tensor | None, *rest: Any) -> Pair:
    dw = x.new_empty(0) if weight is None or not rest[-1] else weight.new_empty(weight.shape)
    return gradient.new_empty(gradient.shape), dw


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    x, weight, _, *ctx.rest = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _norm_gradients(ctx: Any, gradient: Tensor, _: object) -> tuple[Any, ...]:
    x, weight, rstd = ctx.saved_tensors
    trains_weight = weight is not None and ctx.needs_input_grad[1]
    dx, dw = _rms_norm_backward(gradient, x, weight, rstd, *ctx.rest, trains_weight)
    return dx, dw if trains_weight else None, None, None, None, None


_rms_norm.register_autograd(_norm_gradients, setup_context=_keep_norm)


class RMSNormFunction:
    """What stands in for LigerRMSNormFunction."""

    @staticmethod
    def apply(
        x: Tensor,
        weight: Tensor | None,
        eps: float,
        offset: float = 0.0,
        casting_mode: str = "llama",
        in_place: bool = True,
        row_mode: bool | None = None,
    ) -> Tensor:
        """Return x / rms(x) * (offset + weight) over the last dimension, in x's dtype."""
        if not torch.compiler.is_compiling():
            from liger_kernel.ops import LigerRMSNormFunction

            eager: Tensor = LigerRMSNormFunction.apply(
                x, weight, eps, offset, casting_mode, in_place, row_mode
            )
            return eager
        how = (float(eps), float(offset), casting_mode, bool(row_mode))
        out: Tensor = _rms_norm(x, weight, *how)[0]
        return out


@torch.library.custom_op("raytrain_adv::liger_layer_norm", mutates_args=())
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Triple:
    from liger_kernel.ops.layer_norm import layer_norm_forward

    out, _, mean, rstd, *_ = layer_norm_forward(x.contiguous(), weight, bias, eps)
    return out, mean, rstd


@_layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Triple:
    one = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    return x.new_empty(x.shape), one, torch.empty_like(one)


@torch.library.custom_op("raytrain_adv::liger_layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> Triple:
    from liger_kernel.ops.layer_norm import layer_norm_backward

    rows = x.contiguous().view(-1, x.shape[-1])
    dx, dw, db = layer_norm_backward(gradient.contiguous(), rows, weight, bias, mean, rstd)
    return dx, dw, db


@_layer_norm_backward.register_fake
def _(gradient: Tensor, *kept: Tensor) -> Triple:
    dx, dw, db = (tensor.new_empty(tensor.shape) for tensor in kept[:3])
    return dx, dw, db


def _keep_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _layer_norm_gradients(ctx: Any, gradient: Tensor, *_: object) -> tuple[Any, ...]:
    gradients = _layer_norm_backward(gradient, *ctx.saved_tensors)
    return *gradients, None


_layer_norm.register_autograd(_layer_norm_gradients, setup_context=_keep_layer_norm)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    impl: object = None,
    mode: object = None,
) -> Tensor:
    """Stand in for liger_kernel.functional.layer_norm."""
    if not torch.compiler.is_compiling():
        from liger_kernel.functional import layer_norm as theirs

        eager: Tensor = theirs(x, weight, bias, eps, impl=impl, mode=mode)
        return eager
    bias = torch.zeros_like(weight) if bias is None else bias
    out: Tensor = _layer_norm(x, weight, bias, float(eps))[0]
    return out


@torch.library.custom_op("raytrain_adv::liger_silu_mul", mutates_args=())
def _silu_mul(gate: Tensor, up: Tensor, multiplier: float) -> Tensor:
    from liger_kernel.ops.swiglu import swiglu_forward

    out: Tensor = swiglu_forward(gate.contiguous(), up.contiguous(), multiplier)[2]
    return out


@_silu_mul.register_fake
def _(gate: Tensor, up: Tensor, multiplier: float) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("raytrain_adv::liger_silu_mul_backward", mutates_args=())
def _silu_mul_backward(gradient: Tensor, gate: Tensor, up: Tensor, multiplier: float) -> Pair:
    from liger_kernel.ops.swiglu import swiglu_backward

    # Liger writes the gradients over what it is given.
    form = torch.contiguous_format
    own = gate.clone(memory_format=form), up.clone(memory_format=form)
    d_gate, d_up = swiglu_backward(*own, gradient.contiguous(), multiplier)
    return d_gate, d_up


@_silu_mul_backward.register_fake
def _(gradient: Tensor, gate: Tensor, up: Tensor, multiplier: float) -> Pair:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _keep_gated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.multiplier = inputs
    ctx.save_for_backward(gate, up)


def _gated_gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return *_silu_mul_backward(gradient, *ctx.saved_tensors, ctx.multiplier), None


_silu_mul.register_autograd(_gated_gradients, setup_context=_keep_gated)


def silu_mul(
    gate: Tensor, up: Tensor, gate_multiplier: float = 1.0, down_multiplier: float = 1.0
) -> Tensor:
    """Return silu(gate_multiplier * gate) * up * down_multiplier."""
    if not torch.compiler.is_compiling():
        from liger_kernel.ops import LigerSiLUMulFunction

        eager: Tensor = LigerSiLUMulFunction.apply(
            gate, up, float(gate_multiplier), float(down_multiplier)
        )
        return eager
    out = _silu_mul(gate, up, float(gate_multiplier))
    scaled: Tensor = out if down_multiplier == 1.0 else out * float(down_multiplier)
    return scaled


class SiLUMulFunction:
    """What stands in for LigerSiLUMulFunction."""

    apply = staticmethod(silu_mul)


STAND_INS: dict[str, Any] = {
    "LigerRMSNormFunction": RMSNormFunction,
    "_functional_layer_norm": layer_norm,
    "_swiglu_dispatch": silu_mul,
    "LigerSiLUMulFunction": SiLUMulFunction,
}
"""Global name that Liger's forward passes call -> the same, right under torch.compile too."""
UNDERSTOOD = frozenset({"LigerGELUMulFunction"})
"""Those whose kernels take no number, so that torch.compile finds what they write to."""
