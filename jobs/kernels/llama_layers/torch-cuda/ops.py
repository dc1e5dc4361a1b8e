"""Operators with their gradients, made of the Triton kernels in kernels.py.

As custom operators torch.compile takes them as they are, and autograd knows their backward.
"""

import torch
import triton

from . import kernels

BLOCK = 1024
PROGRAMS_PER_PROCESSOR = 4
"""Programs that share the rows in RMSNorm's backward, each with its own sum for the weight."""


@torch.library.custom_op("llama_layers::swiglu", mutates_args=(), device_types="cuda")
def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up: [..., features] each."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    grid = (triton.cdiv(out.numel(), BLOCK),)
    kernels.swiglu_forward[grid](gate, up, out, out.numel(), BLOCK=BLOCK)
    return out


@swiglu.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@torch.library.custom_op("llama_layers::swiglu_backward", mutates_args=(), device_types="cuda")
def swiglu_backward(
    gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of gate and up."""
    gradient, gate, up = gradient.contiguous(), gate.contiguous(), up.contiguous()
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    grid = (triton.cdiv(gate.numel(), BLOCK),)
    kernels.swiglu_backward[grid](gradient, gate, up, of_gate, of_up, gate.numel(), BLOCK=BLOCK)
    return of_gate, of_up


@swiglu_backward.register_fake
def _(gradient, gate, up):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


swiglu.register_autograd(
    lambda ctx, gradient: swiglu_backward(gradient, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op("llama_layers::rms_norm", mutates_args=(), device_types="cuda")
def rms_norm_forward(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norm, and 1 / rms of each row in float32: [..., features] -> [...]."""
    x = x.contiguous()
    features = x.shape[-1]
    out = torch.empty_like(x)
    inverse = x.new_empty(x.shape[:-1], dtype=torch.float32)
    grid = (inverse.numel(),)
    block = triton.next_power_of_2(features)
    kernels.rms_norm_forward[grid](
        x, weight, out, inverse, features, epsilon, BLOCK=block, num_warps=warps(block)
    )
    return out, inverse


@rms_norm_forward.register_fake
def _(x, weight, epsilon):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("llama_layers::rms_norm_backward", mutates_args=(), device_types="cuda")
def rms_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x and weight."""
    gradient, x = gradient.contiguous(), x.contiguous()
    features, rows = x.shape[-1], inverse.numel()
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    programs = min(rows, processors * PROGRAMS_PER_PROCESSOR)
    of_x = torch.empty_like(x)
    of_weight = x.new_empty((programs, features), dtype=torch.float32)
    block = triton.next_power_of_2(features)
    kernels.rms_norm_backward[(programs,)](
        gradient,
        x,
        weight,
        inverse,
        of_x,
        of_weight,
        rows,
        features,
        BLOCK=block,
        num_warps=warps(block),
    )
    return of_x, of_weight.sum(dim=0).to(weight.dtype)


@rms_norm_backward.register_fake
def _(gradient, x, weight, inverse):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx, gradient, _):
    return *rms_norm_backward(gradient, *ctx.saved_tensors), None


rms_norm_forward.register_autograd(_backward, setup_context=_save)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return x / rms(x) * weight over the last dimension."""
    return rms_norm_forward(x, weight, epsilon)[0]


def warps(block: int) -> int:
    """Return the number of warps for a row of this many elements."""
    return min(max(block // 256, 1), 16)
