"""The layers. A layer has no constructor: its forward pass is put on the model's own module, so
`self` is that module, with its weights and its linears. It calls its linears as modules, so that
FP8, QAT and adapters on them stay on.
"""

import torch
from torch import nn

from .ops import rms_norm, swiglu


class RMSNorm(nn.Module):
    """In the place of modules with one weight and variance_epsilon."""

    weight: torch.Tensor
    variance_epsilon: float
    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the norm: [..., features] -> [..., features]."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class SwiGLUMLP(nn.Module):
    """In the place of modules with gate_proj, up_proj, down_proj and SiLU."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    can_torch_compile = True
    has_backward = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return down_proj(silu(gate_proj(x)) * up_proj(x))."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
