"""Hold modules whose forward was replaced against their class's own, on the device that trains."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from raytrain_adv.errors import TrainingError
from raytrain_adv.transforms.naming import short
from raytrain_adv.transforms.transform import Plan

if TYPE_CHECKING:
    import torch
    from torch import nn

NUM_TOKENS = 32
VALUES_APART, GRADIENTS_APART = 1e-2, 3e-2
"""How far bf16 values and gradients may lie apart, relative norms; float32 a hundredth of it."""


def probe_forwards(
    model: nn.Module, plan: Plan, device: torch.device, dtype: torch.dtype
) -> tuple[str, ...]:
    """Compare each kind of changed module with its class's forward; return what was found.

    Modules whose forward takes more than one tensor are named as not probed.

    Args:
        model: the model, on the meta device or with weights; it is left as it is.
        plan: what was changed.
        device: the device that trains.
        dtype: the dtype that trains.

    Raises:
        TrainingError: where values or gradients differ by more than rounding, a gradient is
            missing, or a child module that the class calls is not called.
    """
    kinds: dict[tuple[str, str], str] = {}
    for fqn, change in plan.changes.items():
        kinds.setdefault((change.after, short(fqn)), fqn)
    sentences = []
    for (after, _), fqn in kinds.items():
        width = _width(model.get_submodule(fqn))
        if width is None:
            sentences.append(f"{fqn} was not probed by itself: it takes more than one tensor")
            continue
        values, gradients = _compare(model.get_submodule(fqn), fqn, after, width, device, dtype)
        sentences.append(
            f"{fqn} probed on {device.type} in {str(dtype).removeprefix('torch.')}: values "
            f"{values:.2%} and gradients {gradients:.2%} from the class's own"
        )
    return tuple(sentences)


def _width(module: nn.Module) -> int | None:
    """Return the last dimension of a module's one input, where its parameters tell it."""
    from torch import nn

    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    if linears:
        is_mlp = any(
            short(fqn) in ("gate_proj", "gate_up_proj") for fqn, _ in module.named_modules()
        )
        return linears[0].in_features if is_mlp else None
    weight = getattr(module, "weight", None)
    return int(weight.numel()) if weight is not None and weight.ndim == 1 else None


def _compare(
    module: nn.Module,
    fqn: str,
    after: str,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[float, float]:
    """Return how far values and gradients lie from the class's own."""
    import torch

    ours = copy.deepcopy(module).to_empty(device=device).to(dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            center = 1.0 if parameter.ndim == 1 else 0.0
            parameter.normal_(center, 0.02, generator=generator)
    plain = copy.deepcopy(ours)
    plain.__dict__.pop("forward", None)
    x = torch.randn(1, NUM_TOKENS, width, device=device, dtype=dtype, generator=generator)
    pull = torch.randn(1, NUM_TOKENS, width, device=device, dtype=dtype, generator=generator)
    found, called = _passed(ours, x, pull)
    expected, should_call = _passed(plain, x, pull)
    problems = [f"{fqn}.{name} is not called" for name in sorted(should_call - called)]
    problems += [f"no gradient of {name}" for name in expected.keys() - found.keys()]
    apart = {
        name: _distance(found[name], expected[name]) for name in expected.keys() & found.keys()
    }
    scale = 1.0 if dtype.itemsize < 4 else 0.01
    for name, value in apart.items():
        allowed = scale * (VALUES_APART if name == "the output" else GRADIENTS_APART)
        if not value <= allowed:
            problems.append(f"{name}: {value:.2%} from the class's own, {allowed:.2%} allowed")
    if problems:
        raise TrainingError(
            f"{after.partition(' with ')[2] or after} does not do what {fqn} does",
            "\n".join(problems),
            "switch it off for this layer, or report it with the versions installed",
        )
    return apart["the output"], max(v for k, v in apart.items() if k != "the output")


def _passed(
    module: nn.Module, x: torch.Tensor, pull: torch.Tensor
) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Return output and gradients of a forward and backward pass, and the children it called."""
    called: set[str] = set()
    hooks = [
        child.register_forward_hook(lambda *_, fqn=fqn: called.add(fqn))
        for fqn, child in module.named_modules()
        if fqn and next(child.parameters(), None) is not None
    ]
    x = x.clone().requires_grad_()
    output = module(x * 1.0)  # not a leaf: some kernels write their gradient over what they get
    output.backward(pull.clone())
    for hook in hooks:
        hook.remove()
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    found = {"the output": output.detach(), **gradients}
    if x.grad is not None:
        found["its input"] = x.grad
    return found, called


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    size = float(other.float().norm())
    apart = float((one.float() - other.float()).norm())
    return apart / size if size else apart
