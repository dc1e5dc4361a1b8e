"""Compare a replacement forward pass with the module's own: values, gradients, modules it calls."""

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from raytrain_adv.errors import JobError
from raytrain_adv.text import of_error
from raytrain_adv.trial.compare import allowed_errors, differences, precision, relative_errors

SHAPES = ((2, 16), (3, 336))
"""Batch and length of the inputs: few rows, and more than a kernel's block; multiples of 16 for
products in 8 bits."""
VALUES = "the values"  # the result's name, next to its gradients
Layer = TypeVar("Layer")


class Untried(JobError):
    """A module that a trial cannot call."""


@dataclass(frozen=True)
class Candidate:
    """A forward pass that may replace that of a module's class."""

    forward: Callable[..., Any]  # an unbound function of the module
    name: str  # for messages, as `the kernel mine@5302214:RMSNorm`
    module: nn.Module
    """Where it will be installed; it may be on the meta device, and is not changed."""
    leave_out: str  # how to train without it, for messages
    device: torch.device
    dtype: torch.dtype
    owner: nn.Module | None = None
    """The module around it, to find out which gradients a missing one would cut."""
    attribute: str = ""  # its name in the owner

    @property
    def kind(self) -> str:
        """The class whose forward pass it replaces."""
        return type(self.module).__name__


@dataclass(frozen=True)
class SiteTrial:
    """The trial of a layer on one kind of module: its relative errors."""

    layer: str
    module: str  # the class whose forward pass it replaces
    device: str
    dtype: str
    num_modules: int
    value_error: float
    gradient_error: float  # the largest over the input's and all parameters' gradients
    allowed: float  # largest error of a value that rounding explains; of a gradient it may be more

    @property
    def sentence(self) -> str:
        """The trial in words."""
        return (
            f"{self.layer} tested in {self.module} on {self.device} in {self.dtype}: values off "
            f"by {self.value_error:.1e}, gradients by {self.gradient_error:.1e}, of which rounding "
            f"explains {self.allowed:.1e}; in {self.num_modules} modules"
        )


@dataclass(frozen=True)
class _Pass:
    results: dict[str, torch.Tensor | None]
    """VALUES and the gradients, by what they are the gradient of."""
    called: set[str]
    keeps_inputs: bool  # whether input and parameters are unchanged after the forward pass

    @property
    def exact(self) -> dict[str, torch.Tensor]:
        return {name: x for name, x in self.results.items() if x is not None}


def group_alike(model: nn.Module, layers: Mapping[str, Layer]) -> list[tuple[Layer, list[str]]]:
    """Group modules (by fqn) with the same layer, classes and sizes: one trial is good for all."""
    groups: dict[tuple[Layer, object], list[str]] = {}
    for fqn, layer in layers.items():
        module = model.get_submodule(fqn)
        kinds = tuple(type(part).__qualname__ for part in module.modules())
        sizes = tuple(parameter.shape for parameter in module.parameters())
        groups.setdefault((layer, (kinds, sizes)), []).append(fqn)
    return [(layer, fqns) for (layer, _), fqns in groups.items()]


def try_module(candidate: Candidate, layer: str = "", num_modules: int = 1) -> SiteTrial:
    """Compare a forward pass with that of the module's class, on a copy with random weights.
    `layer` and `num_modules` are for the result. Raises JobError when it is wrong, bypasses a
    module, or has no gradient.
    """
    trials = [_try(candidate, shape) for shape in SHAPES]
    values, gradients, allowed = zip(*trials, strict=True)
    return SiteTrial(
        layer or candidate.name,
        candidate.kind,
        candidate.device.type,
        precision(candidate.dtype),
        num_modules,
        max(values),
        max(gradients),
        min(allowed),
    )


def _try(candidate: Candidate, shape: tuple[int, int]) -> tuple[float, float, float]:
    """Return the errors of values and gradients, and the largest of a value that is allowed."""
    untried = Untried(
        f"{candidate.name} cannot be tested in {candidate.kind}",
        "its forward pass takes more than one tensor, or one of unknown size",
        f"{candidate.leave_out}: a forward pass without a trial is not used",
    )
    if not _can_call(candidate.module):
        raise untried
    device, dtype = candidate.device, candidate.dtype
    own = _copy(candidate, candidate.module)
    try:
        expected = _run(candidate, type(own).forward, own, shape)
        noisy = _run(candidate, type(own).forward, own, shape, noise=torch.finfo(dtype).eps)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the module needs other arguments
        raise untried from error
    try:
        found = _run(candidate, candidate.forward, own, shape)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a kernel's code may raise anything
        raise JobError(
            f"{candidate.name} fails as a replacement of {candidate.kind}",
            of_error(error),
            f"{candidate.leave_out}, or correct the kernel",
        ) from error
    if bypassed := sorted(expected.called - found.called):
        raise JobError(
            f"{candidate.name} does not call {', '.join(bypassed)} of {candidate.kind}",
            "it reads their weights, which silently turns off what other features put on them",
            "use a kernel that calls the modules, as LigerSwiGLUMLP does",
        )
    if not found.keeps_inputs and expected.keeps_inputs:
        raise JobError(
            f"{candidate.name} overwrites its arguments, which {candidate.kind} does not",
            "its input or its parameters have other values after the forward pass",
            f"{candidate.leave_out}, or correct the kernel",
        )
    _refuse_cut(candidate, found, expected)
    errors = _errors(found, expected)
    allowed = allowed_errors(_errors(noisy, expected), dtype)
    if wrong := differences(errors, allowed):
        got, due = found.results[VALUES], expected.exact[VALUES]
        if got is not None and (got.dtype, got.shape) != (due.dtype, due.shape):
            wrong = [f"it returns {_describe(got)} instead of {_describe(due)}"]
        raise JobError(
            f"{candidate.name} does not compute what {candidate.kind} does",
            f"on {device.type} in {precision(dtype)}, {math.prod(shape)} rows: {'; '.join(wrong)}",
            f"use another kernel or version, or {candidate.leave_out}",
        )
    value = errors.pop(VALUES)
    return value, max(errors.values(), default=0.0), allowed[VALUES]


def _errors(found: _Pass, expected: _Pass) -> dict[str, float]:
    exact = expected.exact
    same = {n: x for n, x in found.exact.items() if n in exact and x.dtype == exact[n].dtype}
    errors = relative_errors({name: same.get(name) for name in exact}, exact)
    named = {name: f"the gradient of {name or 'its input'}" for name in errors if name != VALUES}
    return {named.get(name, name): error for name, error in errors.items()}


def _cut(found: _Pass, expected: _Pass) -> list[str]:
    return [name for name in expected.exact if found.results[name] is None]


def _refuse_cut(candidate: Candidate, found: _Pass, expected: _Pass) -> None:
    if not (cut := _cut(found, expected)):
        return
    named = [name for name in cut if name]
    if next(candidate.module.parameters(), None) is None:
        named += _cut_in_owner(candidate)
    lost = filter(None, ["its input" if "" in cut else "", ", ".join(dict.fromkeys(named))])
    raise JobError(
        f"{candidate.name} has no gradient: it computes forward only, and was made for inference",
        f"in {candidate.kind} it would cut the gradient of {' and of '.join(lost)}",
        "leave it out; of forward-only kernels only the layers of kernels-community/activation can "
        "be trained, with a gradient of raytrain_adv's",
    )


def _cut_in_owner(candidate: Candidate) -> list[str]:
    """Return the modules of the one around that would be left without a gradient."""
    owner = candidate.owner
    if owner is None or not _can_call(owner):
        return []
    own = _copy(candidate, owner)
    try:
        expected = _run(candidate, type(own).forward, own, SHAPES[0])
        inner = own.get_submodule(candidate.attribute)
        vars(inner)["forward"] = candidate.forward.__get__(inner)
        found = _run(candidate, type(own).forward, own, SHAPES[0])
    except (TypeError, ValueError, RuntimeError):  # it needs other arguments: no names then
        return []
    return [name.rpartition(".")[0] for name in _cut(found, expected) if name]


def _describe(x: torch.Tensor) -> str:
    return f"{precision(x.dtype)} {list(x.shape)}"


def _run(
    candidate: Candidate,
    forward: Callable[..., Any],
    module: nn.Module,
    shape: tuple[int, int],
    noise: float = 0.0,
) -> _Pass:
    """Run forward and backward pass on the same numbers each time, except for relative noise."""
    device, dtype = candidate.device, candidate.dtype
    called: set[str] = set()
    hooks = [
        child.register_forward_hook(lambda *_, fqn=fqn: called.add(fqn))
        for fqn, child in module.named_modules()
        if fqn and next(child.parameters(recurse=False), None) is not None
    ]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.enable_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            x = torch.randn(*shape, _input_size(module) or 0, generator=generator)
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
                wanted = list(inputs.values())
                gradients = torch.autograd.grad(value, wanted, pull, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    results = {VALUES: value.detach(), **dict(zip(inputs, gradients, strict=True))}
    return _Pass(results, called, keeps)


def _copy(candidate: Candidate, module: nn.Module) -> nn.Module:
    """Return a copy of a module on the device, with random weights that keep values near 1."""
    own = copy.deepcopy(module)
    vars(own).pop("forward", None)
    own = own.to_empty(device=candidate.device).to(candidate.dtype).train()
    generator = torch.Generator().manual_seed(1)
    for part in own.modules():
        if isinstance(part, nn.Dropout):
            part.eval()  # a kernel that calls modules in another order would drop other values
    with torch.no_grad():
        for parameter in own.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            is_matrix = parameter.ndim > 1
            parameter.copy_(values / math.sqrt(values.shape[-1]) if is_matrix else 1 + 0.1 * values)
        for buffer in own.buffers():
            buffer.zero_()
    return own


def _can_call(module: nn.Module) -> bool:
    """Return whether a module takes one tensor of known size, or is an attention."""
    if _input_size(module) is None:
        return False
    every = inspect.signature(type(module).forward).parameters.values()
    needed = [p for p in every if p.default is p.empty]
    positional = [p for p in needed if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) == 2 or _is_attention(module)  # self and the tensor


def _is_attention(module: nn.Module) -> bool:
    """Return whether a module is an attention of transformers that takes a rotary embedding."""
    names = inspect.signature(type(module).forward).parameters
    return "position_embeddings" in names and {"config", "head_dim"} <= vars(module).keys()


def _rotation(
    module: nn.Module, shape: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Return an attention's other arguments: cosine and sine [batch, time, features]."""
    untyped: Any = module
    options = getattr(untyped.config, "rope_parameters", None)
    share = options.get("partial_rotary_factor", 1.0) if isinstance(options, dict) else 1.0
    size = int(untyped.head_dim * share)
    angles = torch.outer(torch.arange(shape[1]), 0.5 ** torch.arange(size // 2)).repeat(1, 2)
    angles = angles.expand(shape[0], -1, -1)
    cos, sin = (f(angles).to(device, dtype) for f in (torch.cos, torch.sin))
    return {"position_embeddings": (cos, sin), "attention_mask": None}


def _input_size(module: nn.Module) -> int | None:
    """Return the size of a module's input; None if it is unknown."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is not None:
        return weight.shape[-1]
    sizes = (vars(child).get("in_features") for child in module.modules())
    size = next((size for size in sizes if isinstance(size, int)), None)
    has_none = next(module.parameters(), None) is None
    return 64 if size is None and has_none else size
