"""Kernels as their authors publish them, written into a folder for a test."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytrain_adv.errors import JobError

LAYERS = '''
import torch
from torch import nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Right, marked for compile."""
    weight: torch.Tensor
    variance_epsilon: float
    can_torch_compile = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        size = (hidden_states.shape[-1],)
        return F.rms_norm(hidden_states, size, self.weight, self.variance_epsilon)


class Unmarked(nn.Module):
    """Right, and says nothing of compile."""
    def forward(self, hidden_states):
        size = (hidden_states.shape[-1],)
        return F.rms_norm(hidden_states, size, self.weight, self.variance_epsilon)


class ForwardOnly(nn.Module):
    """Has no gradient, and does not say so."""
    can_torch_compile = True

    def forward(self, hidden_states):
        size = (hidden_states.shape[-1],)
        with torch.no_grad():
            return F.rms_norm(hidden_states, size, self.weight, self.variance_epsilon)


class SaysForwardOnly(ForwardOnly):
    """Has no gradient, and says so."""
    has_backward = False


class WrongGradient(nn.Module):
    """The right values, and a tenth too much gradient for the weight."""
    can_torch_compile = True

    def forward(self, hidden_states):
        weight = self.weight.detach() + 1.1 * (self.weight - self.weight.detach())
        size = (hidden_states.shape[-1],)
        return F.rms_norm(hidden_states, size, weight, self.variance_epsilon)


class WrongValue(nn.Module):
    """Forgets the weight."""
    can_torch_compile = True

    def forward(self, hidden_states):
        size = (hidden_states.shape[-1],)
        return F.rms_norm(hidden_states, size, None, self.variance_epsilon) + 0 * self.weight


class WrongWhenLong(RMSNorm):
    """Forgets what is beyond its first block of rows."""

    def forward(self, hidden_states):
        out = RMSNorm.forward(self, hidden_states)
        rows = out.reshape(-1, out.shape[-1])
        return torch.cat([rows[:256], 0 * rows[256:]]).reshape(out.shape)


class OtherDtype(RMSNorm):
    """Right, and twice as wide as what it was given."""

    def forward(self, hidden_states):
        return RMSNorm.forward(self, hidden_states).double()


class WritesOver(RMSNorm):
    """Leaves its own values in its input, behind autograd's back."""

    def forward(self, hidden_states):
        out = RMSNorm.forward(self, hidden_states.clone())
        hidden_states.data.copy_(out.data)
        return out


class Crashes(nn.Module):
    """Raises."""
    can_torch_compile = True

    def forward(self, hidden_states):
        raise KeyError("no such tile")


class Stateful(nn.Module):
    """Has a constructor."""
    def __init__(self):
        super().__init__()

    def forward(self, hidden_states):
        return hidden_states


class TwoArguments(nn.Module):
    """Takes what the module does not give."""
    def forward(self, a, b):
        return a


class SwiGLUMLP(nn.Module):
    """Right: calls its linears."""
    can_torch_compile = True

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Bypass(nn.Module):
    """Reads the weights and never calls the linears."""
    can_torch_compile = True

    def forward(self, x):
        gated = F.silu(F.linear(x, self.gate_proj.weight)) * F.linear(x, self.up_proj.weight)
        return F.linear(gated, self.down_proj.weight)


class Linear(nn.Module):
    """A linear by its weight, as LigerLinear."""
    can_torch_compile = True

    def forward(self, input):
        return F.linear(input, self.weight, self.bias)


class ForwardOnlySiLU(nn.Module):
    """An activation that autograd does not see, by a name that is not known."""
    can_torch_compile = True

    def forward(self, x):
        with torch.no_grad():
            return F.silu(x)
'''
ACTIVATION = """
import torch
from torch import nn
from torch.nn import functional as F


def written_into(out, value):
    with torch.no_grad():
        out.copy_(value)
    return out.detach()


class SiluAndMul(nn.Module):
    can_torch_compile: bool = True

    def forward(self, x: torch.Tensor):
        d = x.shape[-1] // 2
        out = torch.empty(x.shape[:-1] + (d,), dtype=x.dtype, device=x.device)
        return written_into(out, F.silu(x[..., :d]) * x[..., d:])


class Silu(nn.Module):
    can_torch_compile: bool = True

    def forward(self, x: torch.Tensor):
        return written_into(torch.empty_like(x), F.silu(x))


class GeluTanh(nn.Module):
    can_torch_compile: bool = True

    def forward(self, x: torch.Tensor):
        return written_into(torch.empty_like(x), F.gelu(x, approximate="tanh"))


class NewGELU(GeluTanh):
    can_torch_compile: bool = True


class FatreluAndMul(nn.Module):
    can_torch_compile: bool = True

    def __init__(self, threshold: float = 0.0):
        super().__init__()
        self.threshold = threshold

    def forward(self, x: torch.Tensor):
        return x
"""
"""The surface of kernels-community/activation: layers that write into a tensor, without autograd
and without saying so.
"""


def write_kernel(
    folder: Path,
    layers: str = LAYERS,
    variant: str = "torch-cpu",
    name: str = "test-kernel",
    **metadata: object,
) -> Path:
    """Write a kernel's folder with one build, and return it."""
    build = folder / "build" / variant
    build.mkdir(parents=True)
    (build / "__init__.py").write_text("from . import layers\n\n__all__ = ['layers']\n")
    (build / "layers.py").write_text(layers)
    tag = hashlib.sha256(str(build).encode()).hexdigest()[:8]
    described = {
        "id": f"_{name.replace('-', '_')}_{tag}",
        "name": name,
        "version": 1,
        "license": "Apache-2.0",
        "backend": {"type": "cuda" if "cu" in variant else "cpu"},
        "python-depends": [],
        **metadata,
    }
    (build / "metadata.json").write_text(json.dumps(described))
    return folder


def layers(folder: Path, **named: str) -> dict[str, Any]:
    """Return an entry of kernel_name: site -> layer."""
    return {"path": str(folder), "layers": named}


def refusal(run: Callable[..., Any], *args: Any, **keys: Any) -> str:
    """Return the message with which a call is refused; it is in the house form."""
    with pytest.raises(JobError) as caught:
        run(*args, **keys)
    assert caught.value.found and caught.value.fix
    return str(caught.value)
