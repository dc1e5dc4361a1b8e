"""Try a kernel out on a module before it is trusted with training: values, gradients, and that it
calls what the module calls.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from raytrain_adv.errors import JobError

TOKENS = (2, 16)
"""Batch and length of the trial's input; 32 rows in all, which FP8 products can divide by 16."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest error, relative in norm, that is the dtype's rounding: about four roundings of each value
(in float32 with room for another order of sums)."""


@dataclass(frozen=True)
class Trial:
    """How far a kernel is from the module it stands in for, relative in norm."""

    value_error: float
    gradient_error: float
    """The largest over the input's and all parameters' gradients."""


@dataclass(frozen=True)
class _Pass:
    value: torch.Tensor
    gradients: dict[str, torch.Tensor | None]
    called: set[str]


def try_out(
    forward: Callable[..., Any],
    module: nn.Module,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    owner: nn.Module | None = None,
    attribute: str = "",
) -> Trial:
    """Compare a kernel's forward pass with that of the module's class, on a copy with random
    weights.

    Args:
        forward: the kernel's, as an unbound function of the module.
        module: where it is to go; it may be on the meta device, and is left as it is.
        name: of the kernel's layer, for messages.
        device: that of training.
        dtype: that of training's products.
        owner: the module that holds it, to find out what a missing gradient would take along.
        attribute: its name in there.

    Raises:
        JobError: when the kernel is wrong, bypasses a module, or has no gradient.
    """
    size = _input_size(module, name)
    own = _copy(module, device, dtype)
    try:
        expected = _run(type(own).forward, own, size, device, dtype)
    except Exception as error:  # the module needs more than one tensor, whatever it says of it
        raise _untried(module, name) from error
    try:
        found = _run(forward, own, size, device, dtype)
    except Exception as error:  # whatever a stranger's code raises, it is said and ends the run
        raise JobError(
            f"the kernel {name} fails where it is to replace {type(module).__name__}",
            f"{type(error).__name__}: {_first_line(error)}",
            "leave that layer out with layers, or mend the kernel",
        ) from error
    bypassed = sorted(expected.called - found.called)
    if bypassed:
        raise JobError(
            f"the kernel {name} does not call {', '.join(bypassed)} of {type(module).__name__}",
            "it reads their weights: FP8, QAT and adapters on them would be off without a word",
            "take a kernel that calls the modules, as LigerSwiGLUMLP does",
        )
    _refuse_cut(found, expected, name, module, owner, attribute, forward, device, dtype)
    return _compared(found, expected, name, module, device, dtype)


def _refuse_cut(
    found: _Pass,
    expected: _Pass,
    name: str,
    module: nn.Module,
    owner: nn.Module | None,
    attribute: str,
    forward: Callable[..., Any],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    cut = [
        part
        for part, gradient in expected.gradients.items()
        if gradient is not None and found.gradients[part] is None
    ]
    if not cut:
        return
    named = [part for part in cut if part]
    if owner is not None and next(module.parameters(), None) is None:
        named += _cut_in(owner, attribute, forward, device, dtype)
    raise JobError(
        f"the kernel {name} has no gradient: it computes forward only, and was made for inference",
        f"in {type(module).__name__} it would cut the gradient of its input"
        + (f" and of {', '.join(dict.fromkeys(named))}" if named else ""),
        "leave it out; of forward-only kernels the layers of kernels-community/activation can be "
        "trained, as their gradient is known here",
    )


def _cut_in(
    owner: nn.Module,
    attribute: str,
    forward: Callable[..., Any],
    device: torch.device,
    dtype: torch.dtype,
) -> list[str]:
    """Return the parameters of the module around that would be left without a gradient."""
    size = _size_of(owner)
    if size is None or not is_one_tensor(owner):
        return []
    own = _copy(owner, device, dtype)
    try:
        expected = _run(type(own).forward, own, size, device, dtype)
        inner = own.get_submodule(attribute)
        vars(inner)["forward"] = forward.__get__(inner)
        found = _run(type(own).forward, own, size, device, dtype)
    except (TypeError, ValueError, RuntimeError):  # it needs more than a tensor: names are a help
        return []
    return [
        part.rpartition(".")[0]
        for part, gradient in expected.gradients.items()
        if part and gradient is not None and found.gradients[part] is None
    ]


def _compared(
    found: _Pass,
    expected: _Pass,
    name: str,
    module: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
) -> Trial:
    errors = {
        part: _error(found.gradients[part], gradient)
        for part, gradient in expected.gradients.items()
        if gradient is not None
    }
    trial = Trial(_error(found.value, expected.value), max(errors.values(), default=0.0))
    limit = TOLERANCE[dtype]
    if trial.value_error <= limit and trial.gradient_error <= limit:
        return trial
    worst = max(errors, key=lambda part: errors[part], default="")
    of = worst or "its input"
    raise JobError(
        f"the kernel {name} does not compute what {type(module).__name__} does",
        f"on {device.type} in {str(dtype).removeprefix('torch.')}: values are off by "
        f"{trial.value_error:.2g}, the gradient of {of} by {trial.gradient_error:.2g}; rounding "
        f"explains {limit:g}",
        "take another kernel or version, or leave that layer out with layers",
    )


def _error(found: torch.Tensor | None, expected: torch.Tensor) -> float:
    if found is None or found.shape != expected.shape:
        return math.inf
    scale = float(expected.float().norm()) or 1.0
    error = float((found.float() - expected.float()).norm()) / scale
    return error if math.isfinite(error) else math.inf


def _run(
    forward: Callable[..., Any],
    module: nn.Module,
    size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> _Pass:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    called: set[str] = set()
    hooks = [
        child.register_forward_hook(lambda *_, fqn=fqn: called.add(fqn))
        for fqn, child in module.named_modules()
        if fqn and next(child.parameters(recurse=False), None) is not None
    ]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(0)
            x = random(*TOKENS, size).requires_grad_()
            value = forward(module, x)
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"it returns {type(value).__name__}, not one tensor")
            inputs = {"": x, **{n: p for n, p in module.named_parameters() if p.requires_grad}}
            gradients: tuple[torch.Tensor | None, ...] = (None,) * len(inputs)
            if value.requires_grad:
                gradients = torch.autograd.grad(
                    value, list(inputs.values()), random(*value.shape), allow_unused=True
                )
    finally:
        for hook in hooks:
            hook.remove()
    return _Pass(value.detach(), dict(zip(inputs, gradients, strict=True)), called)


def _copy(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a module on the device, with random weights that keep values near 1."""
    own = copy.deepcopy(module)
    vars(own).pop("forward", None)
    own = own.to_empty(device=device).to(dtype).train()
    generator = torch.Generator().manual_seed(1)
    for part in own.modules():
        if isinstance(part, nn.Dropout):
            part.eval()  # a kernel may call modules in another order, and would drop other values
    with torch.no_grad():
        for parameter in own.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                values /= math.sqrt(parameter.shape[-1])
            else:
                values = 1 + 0.1 * values
            parameter.copy_(values)
        for buffer in own.buffers():
            buffer.zero_()
    return own


def is_one_tensor(module: nn.Module) -> bool:
    """Whether a module's forward pass can be called with one tensor and nothing else."""
    needed = [
        parameter
        for parameter in inspect.signature(type(module).forward).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return len(needed) == 2  # self and the tensor


def _size_of(module: nn.Module) -> int | None:
    """Return the size of a module's input; none where it cannot be told."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is not None:
        return weight.shape[-1]
    for child in module.modules():
        size = vars(child).get("in_features")
        if isinstance(size, int):
            return size
    return None if next(module.parameters(), None) is not None else 64


def _input_size(module: nn.Module, name: str) -> int:
    size = _size_of(module)
    if size is None or not is_one_tensor(module):
        raise _untried(module, name)
    return size


def _untried(module: nn.Module, name: str) -> JobError:
    return JobError(
        f"the kernel {name} cannot be tried out in {type(module).__name__}",
        "its forward pass takes more than one tensor, or one of unknown size",
        "leave that layer out with layers: what cannot be tried out is not used",
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
