"""Try a forward pass out on a module before it is trusted with training: values, gradients, and
that it calls what the module calls.
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

SHAPES = ((2, 16), (3, 336))
"""Batch and length of the trial's inputs: few rows, and more than the blocks that kernels cut them
into; FP8 products can divide both by 16."""
TOLERANCE = {torch.float32: 3e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Largest error, relative in norm, that is the dtype's rounding: two or three roundings of each
value (in float32 with room for another order of sums).

On top comes what the module itself makes of rounding its input once: little in most, 3 to 5 % where
values are rounded to 8 bits inside and some fall on the other side."""


VALUES = "the values"
"""The result, beside the gradients by the name of what they are of."""


class Untried(JobError):
    """A module that a trial does not know how to call."""


@dataclass(frozen=True)
class Trial:
    """How far a kernel is from the module it stands in for, relative in norm."""

    value_error: float
    gradient_error: float
    """The largest over the input's and all parameters' gradients."""
    allowed: float
    """What rounding explains, of a value; of a gradient it may be more."""


@dataclass(frozen=True)
class Candidate:
    """A forward pass that is to stand in for that of a module's class."""

    forward: Callable[..., Any]
    """An unbound function of the module."""
    name: str
    """For messages, as `the kernel mine@5302214:RMSNorm`."""
    module: nn.Module
    """Where it is to go; it may be on the meta device, and is left as it is."""
    leave_out: str
    """What to do without it, for messages."""
    owner: nn.Module | None = None
    """The module that holds it, to find out what a missing gradient would take along."""
    attribute: str = ""
    """Its name in there."""

    @property
    def kind(self) -> str:
        """The class it stands in for."""
        return type(self.module).__name__


@dataclass(frozen=True)
class _Pass:
    value: torch.Tensor
    gradients: dict[str, torch.Tensor | None]
    called: set[str]
    keeps_inputs: bool
    """Whether input and parameters are after the forward pass what they were before."""


def try_out(candidate: Candidate, device: torch.device, dtype: torch.dtype) -> Trial:
    """Compare a forward pass with that of the module's class, on a copy with random weights.

    Args:
        candidate: what to try.
        device: that of training.
        dtype: that of training's products.

    Raises:
        JobError: when it is wrong, bypasses a module, or has no gradient.
    """
    trials = [_tried(candidate, shape, device, dtype) for shape in SHAPES]
    return Trial(
        max(t.value_error for t in trials),
        max(t.gradient_error for t in trials),
        min(t.allowed for t in trials),
    )


def _tried(
    candidate: Candidate, shape: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> Trial:
    if not _can_try(candidate.module):
        raise _untried(candidate)
    own = _copy(candidate.module, device, dtype)
    try:
        expected = _run(type(own).forward, own, shape, device, dtype)
        noisy = _run(type(own).forward, own, shape, device, dtype, noise=torch.finfo(dtype).eps)
    except Exception as error:  # the module needs more than it got, whatever it says of it
        raise _untried(candidate) from error
    try:
        found = _run(candidate.forward, own, shape, device, dtype)
    except Exception as error:  # whatever a stranger's code raises, it is said and ends the run
        raise JobError(
            f"{candidate.name} fails where it is to replace {candidate.kind}",
            f"{type(error).__name__}: {_first_line(error)}",
            f"{candidate.leave_out}, or mend the kernel",
        ) from error
    bypassed = sorted(expected.called - found.called)
    if bypassed:
        raise JobError(
            f"{candidate.name} does not call {', '.join(bypassed)} of {candidate.kind}",
            "it reads their weights: FP8, QAT and adapters on them would be off without a word",
            "take a kernel that calls the modules, as LigerSwiGLUMLP does",
        )
    if not found.keeps_inputs and expected.keeps_inputs:
        raise JobError(
            f"{candidate.name} writes over what it is given, which {candidate.kind} does not",
            "its input or its parameters have other values after the forward pass",
            f"{candidate.leave_out}, or mend the kernel",
        )
    _refuse_cut(candidate, found, expected, device, dtype)
    return _compared(candidate, found, expected, noisy, shape, device, dtype)


def _refuse_cut(
    candidate: Candidate, found: _Pass, expected: _Pass, device: torch.device, dtype: torch.dtype
) -> None:
    cut = [
        part
        for part, gradient in expected.gradients.items()
        if gradient is not None and found.gradients[part] is None
    ]
    if not cut:
        return
    named = [part for part in cut if part]
    if next(candidate.module.parameters(), None) is None:
        named += _cut_in_owner(candidate, device, dtype)
    lost = ["its input"] if "" in cut else []
    lost += [", ".join(dict.fromkeys(named))] if named else []
    raise JobError(
        f"{candidate.name} has no gradient: it computes forward only, and was made for inference",
        f"in {candidate.kind} it would cut the gradient of {' and of '.join(lost)}",
        "leave it out; of forward-only kernels the layers of kernels-community/activation can be "
        "trained, as their gradient is known here",
    )


def _cut_in_owner(candidate: Candidate, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return the parameters of the module around that would be left without a gradient."""
    owner = candidate.owner
    if owner is None or not _can_try(owner):
        return []
    own = _copy(owner, device, dtype)
    try:
        expected = _run(type(own).forward, own, SHAPES[0], device, dtype)
        inner = own.get_submodule(candidate.attribute)
        vars(inner)["forward"] = candidate.forward.__get__(inner)
        found = _run(type(own).forward, own, SHAPES[0], device, dtype)
    except (TypeError, ValueError, RuntimeError):  # it needs more than a tensor: names are a help
        return []
    return [
        part.rpartition(".")[0]
        for part, gradient in expected.gradients.items()
        if part and gradient is not None and found.gradients[part] is None
    ]


def _compared(
    candidate: Candidate,
    found: _Pass,
    expected: _Pass,
    noisy: _Pass,
    shape: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> Trial:
    errors, by_noise = _errors(found, expected), _errors(noisy, expected)
    allowed = {part: TOLERANCE[dtype] + noise for part, noise in by_noise.items()}
    of_gradients = {part: error for part, error in errors.items() if part != VALUES}
    trial = Trial(errors[VALUES], max(of_gradients.values(), default=0.0), allowed[VALUES])
    worst = max(errors, key=lambda part: errors[part] / allowed[part])
    if errors[worst] <= allowed[worst]:
        return trial
    if found.value.dtype != expected.value.dtype or found.value.shape != expected.value.shape:
        wrong = f"it returns {_described(found.value)} where {_described(expected.value)} is due"
    else:
        of = max(of_gradients, key=lambda part: of_gradients[part], default="") or "its input"
        wrong = (
            f"values are off by {trial.value_error:.2g}, the gradient of {of} by "
            f"{trial.gradient_error:.2g}; rounding explains {allowed[worst]:.2g}"
        )
    raise JobError(
        f"{candidate.name} does not compute what {candidate.kind} does",
        f"on {device.type} in {_plain(dtype)}, {math.prod(shape)} rows: {wrong}",
        f"take another kernel or version, or {candidate.leave_out}",
    )


def _described(x: torch.Tensor) -> str:
    return f"{_plain(x.dtype)} {list(x.shape)}"


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _errors(found: _Pass, expected: _Pass) -> dict[str, float]:
    """Return how far values and each gradient lie apart."""
    return {VALUES: _error(found.value, expected.value)} | {
        part: _error(found.gradients[part], gradient)
        for part, gradient in expected.gradients.items()
        if gradient is not None
    }


def _error(found: torch.Tensor | None, expected: torch.Tensor) -> float:
    if found is None or found.shape != expected.shape or found.dtype != expected.dtype:
        return math.inf
    scale = float(expected.float().norm()) or 1.0
    error = float((found.float() - expected.float()).norm()) / scale
    return error if math.isfinite(error) else math.inf


def _run(
    forward: Callable[..., Any],
    module: nn.Module,
    shape: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    noise: float = 0.0,
) -> _Pass:
    """Run forward and backward pass on numbers that are the same each time but for the noise, of
    that size to theirs.
    """
    called: set[str] = set()
    hooks = [
        child.register_forward_hook(lambda *_, fqn=fqn: called.add(fqn))
        for fqn, child in module.named_modules()
        if fqn and next(child.parameters(recurse=False), None) is not None
    ]
    devices = [device] if device.type == "cuda" else []
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(0)
            size = _size_of(module) or 0
            x = torch.randn(*shape, size, generator=generator)
            x *= 1 + noise * (2 * torch.rand(x.shape) - 1)
            x = x.to(device, dtype).requires_grad_()
            inputs = {"": x, **{n: p for n, p in module.named_parameters() if p.requires_grad}}
            before = [tensor.detach().clone() for tensor in inputs.values()]
            if _is_attention(module):
                value, *_ = forward(module, x, **_rotation(module, shape, device, dtype))
            else:
                value = forward(module, x)
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"it returns {type(value).__name__}, not one tensor")
            keeps = all(map(torch.equal, before, inputs.values()))
            gradients: tuple[torch.Tensor | None, ...] = (None,) * len(inputs)
            if value.requires_grad:
                pull = torch.randn(*value.shape, generator=generator).to(device, value.dtype)
                gradients = torch.autograd.grad(
                    value, list(inputs.values()), pull, allow_unused=True
                )
    finally:
        for hook in hooks:
            hook.remove()
    return _Pass(value.detach(), dict(zip(inputs, gradients, strict=True)), called, keeps)


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


def _can_try(module: nn.Module) -> bool:
    """Whether a module can be called with one tensor of known size, or is an attention that takes
    rotated positions beside it.
    """
    if _size_of(module) is None:
        return False
    needed = [
        parameter
        for parameter in inspect.signature(type(module).forward).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return len(needed) == 2 or _is_attention(module)  # self and the tensor


def _is_attention(module: nn.Module) -> bool:
    """Whether a module is an attention of transformers that is given its rotary embedding."""
    names = inspect.signature(type(module).forward).parameters
    own = vars(module)
    return "position_embeddings" in names and "config" in own and "head_dim" in own


def _rotation(
    module: nn.Module, shape: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Return what an attention takes beside its input: cosine and sine [batch, time, features]."""
    untyped: Any = module
    options = getattr(untyped.config, "rope_parameters", None)
    share = options.get("partial_rotary_factor", 1.0) if isinstance(options, dict) else 1.0
    size = int(untyped.head_dim * share)
    angles = torch.outer(torch.arange(shape[1]), 0.5 ** torch.arange(size // 2)).repeat(1, 2)
    cos, sin = (
        f(angles).to(device, dtype).expand(shape[0], -1, -1) for f in (torch.cos, torch.sin)
    )
    return {"position_embeddings": (cos, sin), "attention_mask": None}


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


def _untried(candidate: Candidate) -> Untried:
    return Untried(
        f"{candidate.name} cannot be tried out in {candidate.kind}",
        "its forward pass takes more than one tensor, or one of unknown size",
        f"{candidate.leave_out}: what cannot be tried out is not used",
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
