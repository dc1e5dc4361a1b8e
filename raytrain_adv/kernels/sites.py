"""Where in a model a kernel's layer can stand in for a module, and which layer fits where.

transformers registers names for some of its classes, but only with the one series of the kernels
package that it pins (5.23: 0.18; with 0.17.2 it registers nothing). So modules are known by their
shape; what is wrong about a match is found by trying it out (probe.py).
"""

from __future__ import annotations

from typing import Any

from torch import nn

GATED = {"silu": "SwiGLUMLP", "gelu_tanh": "GeGLUMLP", "gelu": "ExactGeGLUMLP"}
"""Activation of a gated MLP -> its site; names as in transformers' table of kernels."""
ACTIVATION_CLASSES = {
    "SiLUActivation": "SiLU",
    "SiLU": "SiLU",
    "GELUActivation": "GeLU",
    "GELUTanh": "GeluTanh",
    "PytorchGELUTanh": "GeluTanh",
    "NewGELUActivation": "NewGELU",
    "FastGELUActivation": "FastGELU",
    "QuickGELUActivation": "QuickGELU",
}
COMPUTES = {
    "SiLU": "silu",
    "GeLU": "gelu",
    "GeluTanh": "gelu_tanh",
    "NewGELU": "gelu_tanh",
    "FastGELU": "gelu_tanh",
    "QuickGELU": "gelu_quick",
}
"""Site of a bare activation -> its function, one of ops.activation.ACTIVATIONS."""
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

FITS: dict[str, tuple[str, ...]] = {
    "LigerRMSNorm": ("RMSNorm",),
    "LlamaRMSNorm": ("RMSNorm",),
    "LigerSwiGLUMLP": ("SwiGLUMLP",),
    "LigerGEGLUMLP": ("GeGLUMLP",),
    "Silu": ("SwiGLUMLP", "SiLU"),
    "SiluAndMul": ("SwiGLUMLP",),
    "GeluTanh": ("GeGLUMLP", "GeluTanh"),
    "GeluTanhAndMul": ("GeGLUMLP",),
    "Gelu": ("ExactGeGLUMLP", "GeLU"),
    "GeluAndMul": ("ExactGeGLUMLP",),
    "NewGELU": ("NewGELU",),
    "FastGELU": ("FastGELU",),
    "QuickGELU": ("QuickGELU",),
}
"""Layer -> the sites it is put in where the job does not say; other layers fit the site, or the
modules of the class, whose name they have.

Of two layers for one site the first here wins: for a gated MLP Silu before SiluAndMul, which needs
gate and up side by side and so moves 7 tensors through memory where the other moves 5.
"""
BRIDGED = {
    "Silu": ("silu", False),
    "SiluAndMul": ("silu", True),
    "Gelu": ("gelu", False),
    "GeluAndMul": ("gelu", True),
    "GeluTanh": ("gelu_tanh", False),
    "GeluTanhAndMul": ("gelu_tanh", True),
    "NewGELU": ("gelu_tanh", False),
    "FastGELU": ("gelu_tanh", False),
    "QuickGELU": ("gelu_quick", False),
}
"""Forward-only layers of kernels-community/activation whose gradient ops.activation has -> the
function they compute, and whether it is fused with the product."""


def sites_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names under which a module can be asked for: its site, what transformers registers
    it as, its class.
    """
    kind = type(module)
    names = [_by_shape(module), vars(kind).get("kernel_layer_name"), kind.__name__]
    return tuple(dict.fromkeys(name for name in names if isinstance(name, str)))


def all_sites(model: nn.Module) -> dict[str, list[str]]:
    """Return site -> the modules there, in the model's order."""
    found: dict[str, list[str]] = {}
    for fqn, module in model.named_modules():
        if fqn:
            for site in sites_of(module):
                found.setdefault(site, []).append(fqn)
    return found


def shape_name(module: nn.Module) -> str | None:
    """Return the site a module is by its shape; none where it is none that is known."""
    return _by_shape(module)


def is_linear_map(module: nn.Module) -> bool:
    """Whether a module is a linear, or stands for one: FP8, QAT and adapters put such modules in a
    linear's place, and a kernel would compute with the weight and pass them by.
    """
    from transformers.pytorch_utils import Conv1D

    has_sizes = hasattr(module, "in_features") and hasattr(module, "out_features")
    return isinstance(module, nn.Linear | Conv1D) or has_sizes or hasattr(module, "base_layer")


def _by_shape(module: nn.Module) -> str | None:
    name = type(module).__name__
    children = dict(module.named_children())
    if name.endswith("RMSNorm") and not children:
        epsilon = vars(module).get("variance_epsilon")
        is_plain = list(dict(module.named_parameters())) == ["weight"]
        return "RMSNorm" if is_plain and isinstance(epsilon, float) else None
    if all(part in children for part in PROJECTIONS) and set(children) <= {*PROJECTIONS, "act_fn"}:
        untyped: Any = module
        act = getattr(untyped, "act_fn", None)
        own = list(module.named_parameters(recurse=False))
        kind = COMPUTES.get(_activation(act) or "") if isinstance(act, nn.Module) else None
        return GATED.get(kind or "") if not own else None
    return _activation(module)


def _activation(module: nn.Module) -> str | None:
    if type(module) is nn.GELU:
        return "GeluTanh" if module.approximate == "tanh" else "GeLU"
    return ACTIVATION_CLASSES.get(type(module).__name__)
