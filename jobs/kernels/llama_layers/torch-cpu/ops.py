"""What ops.py of the build for GPUs computes, in PyTorch."""

import torch
from torch.nn import functional


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return x / rms(x) * weight over the last dimension."""
    return functional.rms_norm(x, (x.shape[-1],), weight, epsilon)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up."""
    return functional.silu(gate) * up
