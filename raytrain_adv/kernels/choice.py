"""Which layer of which kernel goes where in a model, decided without running any kernel's code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from raytrain_adv.errors import JobError
from raytrain_adv.kernels import sites
from raytrain_adv.kernels.fetch import Build
from raytrain_adv.kernels.layers import Layer, read_layers


@dataclass(frozen=True)
class Chosen:
    """The layer for one module."""

    build: Build
    layer: str
    site: str

    @property
    def name(self) -> str:
        """Kernel, commit and layer, for plans and reports."""
        return f"{self.build.name}:{self.layer}"

    @property
    def is_bridged(self) -> bool:
        """Whether its gradient is raytrain_adv's."""
        return self.layer in sites.BRIDGED


@dataclass
class Choice:
    """The layers for a model."""

    layers: dict[str, Chosen] = field(default_factory=dict)
    """Module -> its layer, in the model's order."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Module that a kernel could be for -> why it keeps its forward pass."""
    notes: list[str] = field(default_factory=list)


def choose(model: nn.Module, builds: Sequence[Build], compiled: bool) -> Choice:
    """Choose the layers.

    Args:
        model: it may be on the meta device.
        builds: the kernels, in the job's order.
        compiled: whether torch.compile will trace the model.

    Raises:
        JobError: when a layer that is named is not there or cannot be used, a kernel replaces
            nothing, or two kernels want the same module.
    """
    choice = Choice()
    places = sites.all_sites(model)
    for build in builds:
        _add(choice, model, places, build, compiled)
    order = [fqn for fqn, _ in model.named_modules()]
    choice.layers = {fqn: choice.layers[fqn] for fqn in order if fqn in choice.layers}
    for fqn, module in model.named_modules():
        site = sites.shape_name(module)
        if site is not None and fqn not in choice.layers:
            reason = f"no kernel that is asked for is for {site}"
            if _inside(fqn, choice):
                reason = "inside a module whose forward pass is the kernel's"
            choice.skipped.setdefault(fqn, reason)
    choice.skipped = {f: r for f, r in choice.skipped.items() if f not in choice.layers}
    return choice


def _add(
    choice: Choice, model: nn.Module, places: dict[str, list[str]], build: Build, compiled: bool
) -> None:
    layers = read_layers(build.folder)
    named = build.wanted.layers
    pairs = list(named.items()) if named else _fitting(layers, places)
    if named:
        _refuse_unknown(build, named, layers, places)
    left: list[str] = []
    found = 0
    for site, layer in pairs:
        reason = _unusable(layers[layer], compiled)
        if reason and named:
            raise JobError(
                f"the kernel layer {build.wanted.label}:{layer} cannot be used here",
                reason,
                f"take {site} out of layers" + ("" if not compiled else ", or torch_compile off"),
            )
        if reason:
            left.append(f"{layer} for {site}: {reason}")
            for fqn in places[site]:
                choice.skipped.setdefault(fqn, f"{build.name}:{layer}: {reason}")
            continue
        for fqn in places[site]:
            found += _claim(choice, model, fqn, Chosen(build, layer, site), bool(named))
    choice.notes += [f"left out of {build.name}: {one}" for one in left]
    if not found:
        raise JobError(
            f"the kernel {build.wanted.asked} was asked for and would replace nothing",
            "\n".join(left)
            or f"its layers are {', '.join(layers) or 'none'}; the model has modules for "
            f"{', '.join(_known(places)) or 'none'}",
            "take it out of kernel_name, or say with layers what it is for: "
            "{site or class of the module: layer of the kernel}",
        )


def _fitting(layers: dict[str, Layer], places: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Return (site, layer) for each layer that fits somewhere; the better one first for each."""
    order = [*(n for n in sites.FITS if n in layers), *(n for n in layers if n not in sites.FITS)]
    pairs = [(s, n) for n in order for s in sites.FITS.get(n, (n,)) if s in places]
    gated = [pair for pair in pairs if pair[0] in sites.GATED.values()]
    return gated + [pair for pair in pairs if pair not in gated]


def _refuse_unknown(
    build: Build,
    named: dict[str, str],
    layers: dict[str, Layer],
    places: dict[str, list[str]],
) -> None:
    for site, layer in named.items():
        if layer not in layers:
            raise JobError(
                f"the kernel {build.wanted.label} has no layer {layer}",
                f"its layers are {', '.join(sorted(layers)) or 'none'}",
                f"name one of these for {site} in layers",
            )
        if site not in places:
            raise JobError(
                f"the model has no modules for {site}, where layers puts {layer}",
                f"it has modules for {', '.join(_known(places)) or 'none'}",
                "name one of these, or the class of a module",
            )


def _known(places: dict[str, list[str]]) -> list[str]:
    names = {*sites.GATED.values(), *sites.COMPUTES, "RMSNorm"}
    return sorted(place for place in places if place in names)


def _unusable(layer: Layer, compiled: bool) -> str:
    if layer.has_state:
        return "it has a constructor, and would need values that the module does not have"
    if layer.name in sites.BRIDGED:
        return ""
    if not layer.has_backward:
        return "it says has_backward = False: it would cut the gradient of these modules"
    if compiled and not layer.can_torch_compile:
        return "it does not say can_torch_compile = True, and torch_compile is on"
    return ""


def _claim(choice: Choice, model: nn.Module, fqn: str, chosen: Chosen, is_named: bool) -> int:
    """Give a module to a layer, unless another has it; return how many were given."""
    module = model.get_submodule(fqn)
    if sites.is_linear_map(module):
        if not is_named:
            return 0
        raise JobError(
            f"a kernel may not replace {fqn}",
            f"{chosen.name} would compute with the weight of a {type(module).__name__}, and FP8, "
            "QAT and adapters on it would be off without a word",
            "put the layer in the place of a module that calls its linears",
        )
    other = choice.layers.get(fqn) or choice.layers.get(_inside(fqn, choice) or "")
    holds = [f for f in choice.layers if f.startswith(f"{fqn}.")]
    if other is None and holds:
        other = choice.layers[holds[0]]
    if other is None:
        choice.layers[fqn] = chosen
        return 1
    if other.build is chosen.build and not is_named:
        return 0
    raise JobError(
        f"two kernel layers are asked for in {fqn}",
        f"{other.name} and {chosen.name}",
        "leave one of them out with layers",
    )


def _inside(fqn: str, choice: Choice) -> str | None:
    """Return the module around this one that has a kernel's forward pass; none where none has."""
    while "." in fqn:
        fqn = fqn.rpartition(".")[0]
        if fqn in choice.layers:
            return fqn
    return None
