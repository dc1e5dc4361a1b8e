"""Select the kernel layer for each module of a model by the module's shape, and from the kernel's
source alone: the driver may lack what its code needs to run.
"""

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from raytrain_adv.errors import JobError
from raytrain_adv.kernels.fetch import Build

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
    **dict.fromkeys(("GeluTanh", "NewGELU", "FastGELU"), "gelu_tanh"),
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
}
"""Layer -> its default sites; others fit the site or class whose name they have. Of two for a site
the first wins: Silu moves 5 tensors through memory, SiluAndMul (gate next to up) 7."""
FUSED = "AndMul"  # how the name of a layer ends that multiplies the activation with a second tensor
BRIDGED = {
    **dict.fromkeys(("Silu", "SiluAndMul"), "silu"),
    **dict.fromkeys(("Gelu", "GeluAndMul"), "gelu"),
    **dict.fromkeys(("GeluTanh", "GeluTanhAndMul", "NewGELU", "FastGELU"), "gelu_tanh"),
    "QuickGELU": "gelu_quick",
}
"""Forward-only layers of kernels-community/activation whose gradient ops.activation has -> the
function they compute."""


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
        return self.layer in BRIDGED


Places = dict[str, list[str]]  # site -> its modules, in the model's order


@dataclass
class Choice:
    """The layers for a model."""

    layers: dict[str, Chosen] = field(default_factory=dict)
    """Module -> its layer, in the model's order."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Module that a kernel might replace -> why it keeps its forward pass."""
    notes: list[str] = field(default_factory=list)


def choose(model: nn.Module, builds: Sequence[Build], compiled: bool) -> Choice:
    """Choose the layers for a model, perhaps on the meta device, from kernels in the job's order.
    Raises JobError when a named layer is missing or cannot be used, a kernel replaces nothing, or
    two kernels claim the same module.
    """
    choice = Choice()
    places = all_sites(model)
    for build in builds:
        _add(choice, model, places, build, compiled)
    modules = dict(model.named_modules())
    choice.layers = {fqn: choice.layers[fqn] for fqn in modules if fqn in choice.layers}
    for fqn, module in modules.items():
        if (site := shape_name(module)) is not None:
            reason = f"no enabled kernel is for {site}"
            if _parent_with_kernel(fqn, choice):
                reason = "inside a module whose forward pass is the kernel's"
            choice.skipped.setdefault(fqn, reason)
    choice.skipped = {f: r for f, r in choice.skipped.items() if f not in choice.layers}
    return choice


def _add(choice: Choice, model: nn.Module, places: Places, build: Build, compiled: bool) -> None:
    layers = read_layers(build.folder)
    named = build.wanted.layers
    _refuse_unknown(build, layers, places)
    unused: list[str] = []
    found = 0
    for site, layer in named.items() or _fitting(layers, places):
        reason = _why_unusable(layers[layer], compiled)
        if reason and named:
            raise JobError(
                f"the kernel layer {build.wanted.label}:{layer} cannot be used here",
                reason,
                f"take {site} out of layers" + ("" if not compiled else ", or torch_compile off"),
            )
        if reason:
            unused.append(f"{layer} for {site}: {reason}")
            for fqn in places[site]:
                choice.skipped.setdefault(fqn, f"{build.name}:{layer}: {reason}")
            continue
        for fqn in places[site]:
            found += _claim(choice, model, fqn, Chosen(build, layer, site), bool(named))
    choice.notes += [f"left out of {build.name}: {one}" for one in unused]
    if not found:
        raise JobError(
            f"the kernel {build.wanted.asked} is enabled but would not replace any module",
            "\n".join(unused)
            or f"its layers are {', '.join(layers) or 'none'}; the model has modules for "
            f"{', '.join(_known(places)) or 'none'}",
            "take it out of kernel_name, or define with layers what it is for: "
            "{site or class of the module: layer of the kernel}",
        )


def _fitting(layers: "dict[str, Layer]", places: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Return (site, layer) for each layer that fits somewhere; the better one first for each."""
    order = [*(n for n in FITS if n in layers), *(n for n in layers if n not in FITS)]
    pairs = [(s, n) for n in order for s in FITS.get(n, (n,)) if s in places]
    return sorted(pairs, key=lambda pair: pair[0] not in GATED.values())


def _refuse_unknown(build: Build, layers: "dict[str, Layer]", places: dict[str, list[str]]) -> None:
    for site, layer in build.wanted.layers.items():
        if layer not in layers:
            raise JobError(
                f"the kernel {build.wanted.label} has no layer {layer}",
                f"its layers are {', '.join(sorted(layers)) or 'none'}",
                f"name one of these for {site} in layers",
            )
        if site not in places:
            raise JobError(
                f"the model has no modules for {site}, for which layers names {layer}",
                f"it has modules for {', '.join(_known(places)) or 'none'}",
                "name one of these, or the class of a module",
            )


def _known(places: dict[str, list[str]]) -> list[str]:
    return sorted(places.keys() & {*GATED.values(), *COMPUTES, "RMSNorm"})


def _why_unusable(layer: "Layer", compiled: bool) -> str:
    if layer.has_state:
        return "it has a constructor, and would need values that the module does not have"
    if layer.name in BRIDGED:
        return ""
    if not layer.has_backward:
        return "it declares has_backward = False: it would cut the gradient of these modules"
    if compiled and not layer.can_torch_compile:
        return "it does not declare can_torch_compile = True, and torch_compile is on"
    return ""


def _claim(choice: Choice, model: nn.Module, fqn: str, chosen: Chosen, is_named: bool) -> int:
    """Assign a layer to a module, unless it has one; return how many modules were assigned."""
    module = model.get_submodule(fqn)
    if is_linear_map(module):
        if not is_named:
            return 0
        raise JobError(
            f"a kernel may not replace {fqn}",
            f"{chosen.name} would compute with the weight of a {type(module).__name__}, which "
            "silently turns off what other features put on it",
            "let the layer replace a module that calls its linears",
        )
    inside = next((f for f in choice.layers if f.startswith(f"{fqn}.")), "")
    other = choice.layers.get(_parent_with_kernel(f"{fqn}.", choice) or inside)
    if other is None:
        choice.layers[fqn] = chosen
        return 1
    if other.build is chosen.build and not is_named:
        return 0
    raise JobError(
        f"two kernel layers are named for {fqn}",
        f"{other.name} and {chosen.name}",
        "leave one of them out with layers",
    )


def _parent_with_kernel(fqn: str, choice: Choice) -> str | None:
    while "." in fqn:
        fqn = fqn.rpartition(".")[0]
        if fqn in choice.layers:
            return fqn
    return None


def all_sites(model: nn.Module) -> Places:
    """Return the modules by their sites: shape, name that transformers registers, and class."""
    found: Places = {}
    for fqn, module in model.named_modules():
        kind = type(module)
        names = (shape_name(module), vars(kind).get("kernel_layer_name"), kind.__name__)
        for site in dict.fromkeys(names) if fqn else ():
            if isinstance(site, str):
                found.setdefault(site, []).append(fqn)
    return found


def is_linear_map(module: nn.Module) -> bool:
    """Return whether a module is a linear, or replaces one as those of other features do."""
    from transformers.pytorch_utils import Conv1D

    has_sizes = hasattr(module, "in_features") and hasattr(module, "out_features")
    return isinstance(module, nn.Linear | Conv1D) or has_sizes or hasattr(module, "base_layer")


def shape_name(module: nn.Module) -> str | None:
    """Return the site that a module's shape makes it; None if the shape is unknown."""
    children = dict(module.named_children())
    if type(module).__name__.endswith("RMSNorm") and not children:
        epsilon = vars(module).get("variance_epsilon")
        is_plain = list(dict(module.named_parameters())) == ["weight"]
        return "RMSNorm" if is_plain and isinstance(epsilon, float) else None
    if all(part in children for part in PROJECTIONS) and set(children) <= {*PROJECTIONS, "act_fn"}:
        act = getattr(module, "act_fn", None)
        site = _activation(act) if isinstance(act, nn.Module) else None
        has_own = next(module.parameters(recurse=False), None) is not None
        return GATED.get(COMPUTES.get(site or "", "")) if not has_own else None
    return _activation(module)


def _activation(module: nn.Module) -> str | None:
    if type(module) is nn.GELU:
        return "GeluTanh" if module.approximate == "tanh" else "GeLU"
    return ACTIVATION_CLASSES.get(type(module).__name__)


@dataclass(frozen=True)
class Layer:
    """A layer as its source declares it."""

    name: str
    has_backward: bool
    """False if the source declares it; a layer that declares nothing may still lack it."""
    can_torch_compile: bool
    has_state: bool  # whether it has its own constructor; such a layer cannot replace another


def read_layers(folder: Path) -> dict[str, Layer]:
    """Return the layers of a build (with layers.py or layers/) by name. Raises JobError when there
    are none, or the source cannot be read.
    """
    roots = [folder, *(p for p in sorted(folder.iterdir()) if (p / "__init__.py").is_file())]
    for root in roots:
        for file in (root / "layers.py", root / "layers" / "__init__.py"):
            if file.is_file():
                every = {n: _declared(n, c) for n, c in _classes(file, set()).items()}
                return {name: layer for name, layer in every.items() if layer is not None}
    raise JobError(
        f"the kernel in {folder} has no layers",
        "neither layers.py nor layers/__init__.py",
        "name a kernel that replaces modules; one for attention belongs under flash_attn",
    )


DEFAULTS = {"has_backward": True, "can_torch_compile": False}
Lineage = list[ast.ClassDef]  # a class and its bases with source in the build, the nearest first


def _declared(name: str, lineage: Lineage) -> Layer | None:
    """Return the layer that a class declares; None if it is not a layer."""
    items = [item for node in lineage for item in node.body]
    methods = {item.name for item in items if isinstance(item, ast.FunctionDef)}
    if "forward" not in methods or name.startswith("_"):
        return None
    flags = dict(DEFAULTS)
    for item in reversed(items):  # the nearest class wins
        if isinstance(item, ast.Assign | ast.AnnAssign):
            targets = item.targets if isinstance(item, ast.Assign) else [item.target]
            value = item.value.value if isinstance(item.value, ast.Constant) else None
            for flag in {t.id for t in targets if isinstance(t, ast.Name)} & DEFAULTS.keys():
                is_known = isinstance(item.value, ast.Constant)
                flags[flag] = bool(value) if is_known else DEFAULTS[flag]
    return Layer(name, **flags, has_state="__init__" in methods)


def _classes(file: Path, seen: set[Path]) -> dict[str, Lineage]:
    """Return the classes a file defines, or imports from its neighbors."""
    if file in seen or not file.is_file():
        return {}
    try:
        tree = ast.parse(file.read_text())
    except (OSError, SyntaxError, ValueError) as error:
        raise JobError(
            "a kernel's layers cannot be read", f"{file}: {error}", "correct that file"
        ) from None
    found: dict[str, Lineage] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            names = [base.id for base in node.bases if isinstance(base, ast.Name)]
            bases = [one for name in names for one in found.get(name, [])]
            # As in Python, a base that several classes share comes after all of them.
            found[node.name] = [node, *reversed(dict.fromkeys(reversed(bases)))]
        elif isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= _imported(node, file, seen | {file})
    return found


def _imported(node: ast.ImportFrom, file: Path, seen: set[Path]) -> dict[str, Lineage]:
    found: dict[str, Lineage] = {}
    for alias in node.names:
        path = file.parent / (node.module or alias.name).replace(".", "/")
        module = path.with_suffix(".py")
        classes = _classes(module if module.is_file() else path / "__init__.py", seen)
        if alias.name == "*":
            found |= classes
        elif alias.name in classes:
            found[alias.asname or alias.name] = classes[alias.name]
    return found
