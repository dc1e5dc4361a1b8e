"""Activations computed forward by someone else's kernel, with the gradient that it lacks.

Kernels made for inference write into a given tensor, which autograd does not see.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Unary = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Activation:
    """A function of one number, and its derivative."""

    value: Unary
    backward: Callable[[Tensor, Tensor], Tensor]
    """(gradient of the output, input) -> gradient of the input."""


def _quick(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _quick_backward(gradient: Tensor, x: Tensor) -> Tensor:
    exact = x.float()
    share = torch.sigmoid(1.702 * exact)
    return (gradient.float() * share * (1 + 1.702 * exact * (1 - share))).to(x.dtype)


def _tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _tanh_backward(gradient: Tensor, x: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten.gelu_backward(gradient, x, approximate="tanh")
    return out


# ATen's backward kernels compute in float32 whatever the dtype, and round once.
ACTIVATIONS = {
    "silu": Activation(functional.silu, torch.ops.aten.silu_backward),
    "gelu": Activation(functional.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": Activation(_tanh, _tanh_backward),
    "gelu_quick": Activation(_quick, _quick_backward),
}


def activation(name: str, kind: str, kernel: Unary) -> Any:
    """Return an operator of one tensor: forward by the kernel, backward by ACTIVATIONS[kind]."""
    known = ACTIVATIONS[kind]

    def forward(x: Tensor) -> Tensor:
        return kernel(x)

    def setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return known.backward(gradient, x)

    op = torch.library.custom_op(f"raytrain_adv::{name}", forward, mutates_args=())
    op.register_fake(lambda x: x.new_empty(x.shape))
    op.register_autograd(backward, setup_context=setup)
    return op


def gated(name: str, kind: str, kernel: Unary, is_fused: bool) -> Any:
    """Return an operator activation(gate) * up: forward by the kernel, backward by the derivative.

    The kernel returns a new tensor: activation(x), or if `is_fused` activation(a) * b of a tensor
    with a and b side by side, [..., 2 * features].
    """
    known = ACTIVATIONS[kind]

    def forward(gate: Tensor, up: Tensor) -> Tensor:
        if is_fused:
            return kernel(torch.cat([gate, up], dim=-1))
        return kernel(gate).mul_(up)

    def setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return known.backward(gradient * up, gate), gradient * known.value(gate)

    op = torch.library.custom_op(f"raytrain_adv::{name}", forward, mutates_args=())
    op.register_fake(lambda gate, up: gate.new_empty(gate.shape))
    op.register_autograd(backward, setup_context=setup)
    return op
