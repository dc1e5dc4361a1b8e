"""Replace forward passes by a kernel's, after a trial, through the kernels package."""

import hashlib
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from raytrain_adv.errors import JobError
from raytrain_adv.kernels.select import BRIDGED, FUSED, GATED, Choice
from raytrain_adv.kernels.variants import python_name
from raytrain_adv.ops import activation as ops
from raytrain_adv.text import listed, of_error
from raytrain_adv.trial.module import Candidate, SiteTrial, group_alike, try_module

REGISTERED = ("kernel_layer_name", "kernel_condition")
"""What marks a class for kernelize (kernels 0.16, 0.17)."""


@dataclass(frozen=True)
class LayerSource:
    """Where a layer comes from; the kernels package calls `load`."""

    folder: Path
    layer: str
    site: str

    def load(self) -> type[nn.Module]:
        """Return the layer's class; for a known forward-only one, a class with a gradient."""
        return load_layer(self)

    def __str__(self) -> str:
        return f"{self.folder}:{self.layer}"


def load_module(folder: Path) -> ModuleType:
    """Import a build by its path, without the network. Raises JobError if that fails."""
    from kernels import get_local_kernel

    _forget_others(folder, python_name(folder))
    try:
        module: ModuleType = get_local_kernel(folder)
    except (Exception, SystemExit) as error:  # a kernel's code may raise anything
        raise JobError(
            f"the kernel in {folder} cannot be loaded",
            of_error(error),
            "use a build for this machine, or correct the kernel",
        ) from error
    return module


@cache
def load_layer(source: LayerSource) -> type[nn.Module]:
    """Return a layer of a build. Raises JobError when the build cannot be imported, or has no such
    layer.
    """
    module = load_module(source.folder)
    layers = getattr(module, "layers", None)
    members = vars(layers) if layers else {}
    kind = members.get(source.layer)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        classes = sorted(name for name, value in members.items() if isinstance(value, type))
        raise JobError(
            f"the kernel in {source.folder} has no layer {source.layer}",
            f"layers of {module.__name__}: {', '.join(classes) or 'none'}",
            "its __init__.py needs `from . import layers`",
        )
    return _bridged(source, kind) if source.layer in BRIDGED else kind


def _forget_others(folder: Path, name: str) -> None:
    """Unload another build of this name: kernels 0.17.2 would use its submodules for this."""
    for key, module in list(sys.modules.items()):
        if key == name or key.startswith(f"{name}."):
            file = getattr(module, "__file__", None)
            if file is None or not Path(file).is_relative_to(folder):
                del sys.modules[key]


def _bridged(source: LayerSource, kind: type[nn.Module]) -> type[nn.Module]:
    """Return a layer that computes as the kernel does, with the gradient it lacks."""
    function, is_fused = BRIDGED[source.layer], source.layer.endswith(FUSED)
    kernel = kind().forward
    tag = hashlib.sha256(str(source.folder).encode()).hexdigest()[:8]
    name = f"{source.layer}_{source.site}_{tag}"
    if source.site not in GATED.values():
        if is_fused:
            raise JobError(
                f"{source.layer} computes a product with a second tensor",
                f"layers lets it replace {source.site}, which has one",
                f"write {{{GATED[function]}: {source.layer}}}",
            )
        bare = ops.activation(name, function, kernel)

        class Activation(nn.Module):
            """The kernel's activation, with its derivative."""

            can_torch_compile = has_backward = True

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                out: torch.Tensor = bare(x)
                return out

        return Activation
    product = ops.gated(name, function, kernel, is_fused)

    class GatedMlp(nn.Module):
        """A gated MLP around the kernel's activation; its linears are called as modules."""

        can_torch_compile = has_backward = True
        gate_proj: nn.Module
        up_proj: nn.Module
        down_proj: nn.Module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.down_proj(product(self.gate_proj(x), self.up_proj(x)))
            return out

    return GatedMlp


def install(
    model: nn.Module, choice: Choice, device: torch.device, dtype: torch.dtype, compiled: bool
) -> list[SiteTrial]:
    """Test each layer in a trial on each kind of module it is for, then swap the forward passes.
    Raises JobError when a layer is wrong, has no gradient, bypasses a module or is not put in
    place.
    """
    sources = {
        fqn: LayerSource(chosen.build.folder.absolute(), chosen.layer, chosen.site)
        for fqn, chosen in choice.layers.items()
    }
    groups = group_alike(model, sources)
    trials = []
    for source, fqns in groups:
        owner, _, attribute = fqns[0].rpartition(".")
        name = choice.layers[fqns[0]].name
        candidate = Candidate(
            load_layer(source).forward,
            f"the kernel {name}",
            model.get_submodule(fqns[0]),
            "leave that layer out with layers",
            device,
            dtype,
            model.get_submodule(owner),
            attribute,
        )
        trials.append(try_module(candidate, name, len(fqns)))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for source, fqns in groups:
        swap({fqn: model.get_submodule(fqn) for fqn in fqns}, source, device, compiled)
    return trials


class _Chosen(nn.Module):
    """Shows kernelize only the planned modules: it would replace other registered ones."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        vars(self)["chosen"] = modules

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        yield from vars(self)["chosen"].items()


def swap(
    modules: Mapping[str, nn.Module], source: LayerSource, device: torch.device, compiled: bool
) -> None:
    """Replace the forward pass of each module (by fqn) by the layer's. Raises JobError when the
    kernels package refuses the layer, or does not put it in place.
    """
    from kernels import Mode, kernelize, use_kernel_mapping

    mode = Mode.TRAINING | Mode.TORCH_COMPILE if compiled else Mode.TRAINING
    mapping = {str(source): {device.type: {mode: source}}}
    logger = logging.getLogger("kernels")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            _registered({type(m) for m in modules.values()}, str(source)),
            use_kernel_mapping(mapping, inherit_mapping=False),
        ):
            kernelize(_Chosen(modules), mode=mode, device=device.type, use_fallback=False)
    except (TypeError, ValueError) as error:
        raise JobError(
            f"the kernel layer {source} cannot replace a module",
            str(error).strip(),
            "leave it out with layers, or correct the kernel: a layer has no constructor, no other "
            "members, and takes what the module takes",
        ) from error
    finally:
        logger.setLevel(level)
    expected = load_layer(source).forward
    now = {fqn: vars(module).get("forward") for fqn, module in modules.items()}
    if missing := [f for f, own in now.items() if getattr(own, "__func__", None) is not expected]:
        raise JobError(
            f"the kernel layer {source} was not put in place",
            f"{listed(missing)}: the forward pass is still another one",
            "unset DISABLE_KERNEL_MAPPING if it is set",
        )


@contextmanager
def _registered(kinds: set[type[nn.Module]], name: str) -> Iterator[None]:
    """Register classes under a name inside the block; restore them afterward."""
    before = {kind: {k: vars(kind)[k] for k in REGISTERED if k in vars(kind)} for kind in kinds}
    for kind, values in before.items():
        for key in values:
            delattr(kind, key)
        kind.kernel_layer_name = name  # type: ignore[attr-defined]  # what kernelize looks for
    try:
        yield
    finally:
        for kind, values in before.items():
            del kind.kernel_layer_name  # type: ignore[attr-defined]  # set above
            for key, value in values.items():
                setattr(kind, key, value)
