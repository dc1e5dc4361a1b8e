"""Liger's Triton layers (RMSNorm, SwiGLU, rotary embedding), in this model only: what Liger changes
in the modules of transformers is undone.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from inspect import signature
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, ClassVar

from packaging.version import Version

from raytrain_adv.config.problems import Problem
from raytrain_adv.errors import ClusterError, JobError
from raytrain_adv.transforms.modules import class_name, nearest, own_forward
from raytrain_adv.transforms.transform import (
    Change,
    Context,
    Plan,
    Transform,
    Worker,
    require_gpu,
    require_package,
)

if TYPE_CHECKING:
    from torch import nn

    from raytrain_adv.config.job import JobConfig
    from raytrain_adv.hardware import HardwareFacts

PACKAGE, OFF = "liger-kernel", "set use_liger_kernel: false"
REQUIREMENT = f"{PACKAGE}>=0.8.5"
LAYERS = ("rms_norm", "layer_norm", "swiglu", "geglu")
"""Layers that true turns on where the model has them."""
ROPE = "rope"
LOSSES = ("cross_entropy", "fused_linear_cross_entropy")
COMPILED = (
    "torch_compile fuses norms and MLPs by itself, and cannot fuse what is around Liger's kernels: "
    "with both a step can be slower than with torch_compile alone; compare the two"
)
ROTARY = "apply_rotary_pos_emb"
"""The function by which attention modules of transformers rotate queries and keys."""


class Liger(Transform):
    """Compute norms, gated MLPs and rotary embeddings by Liger's Triton kernels."""

    name: ClassVar[str] = "liger"
    feature: ClassVar[str] = "Liger"
    needs_gpu: ClassVar[bool] = True
    imports: ClassVar[tuple[str, ...]] = ("liger_kernel",)
    tried_with: ClassVar[dict[str, Any]] = {"use_liger_kernel": {"rope": True}}
    careful: ClassVar[dict[str, str]] = {
        "use_kernels": "a module has one kernel: name layers for each that the other does not take"
    }
    stage: ClassVar[str] = "kernel"
    stacks_on: ClassVar[frozenset[str]] = frozenset({"adapter", "precision"})

    use_liger_kernel: bool | dict[str, bool] = False
    """Use Liger's layers: true takes its norms and gated MLPs, except those that use_kernels
    computes; a mapping takes what it names, of rms_norm, layer_norm, swiglu, geglu and rope. The
    loss has its own key, loss_kernel."""

    @property
    def layers(self) -> dict[str, bool]:
        """Every layer Liger has, and whether it is on."""
        given = self.use_liger_kernel
        if isinstance(given, bool):
            return {**dict.fromkeys(LAYERS, given), ROPE: False}
        return {name: given.get(name, False) for name in (*LAYERS, ROPE)}

    @property
    def enabled(self) -> bool:
        """Whether any layer is on."""
        return any(self.layers.values())

    def is_changed(self, key: str) -> bool:
        """Whether the key turns a layer on; `contradictions` finds what else is wrong."""
        return super().is_changed(key) and self.enabled

    def contradictions(self) -> Iterable[Problem]:
        """Refuse names that Liger does not have, and its losses, which have their own key."""
        given = self.use_liger_kernel
        if isinstance(given, bool):
            return
        key = "use_liger_kernel"
        for name, wanted in given.items():
            if name in LOSSES and wanted:
                text = f"{name}: true: the loss has one owner, loss_kernel"
                yield Problem(text, "set loss_kernel: liger, and delete it here", key)
            elif name not in (*LAYERS, ROPE, *LOSSES):
                near = nearest(name, (*LAYERS, ROPE))
                fix = f"did you mean {near[0]}?" if near else f"name {', '.join((*LAYERS, ROPE))}"
                yield Problem(f"Liger has no layer {name}", fix, key)
        if not any(given.values()):
            yield Problem("a mapping that turns nothing on", OFF, key)

    def conflicts(self, job: JobConfig) -> Iterable[Problem]:
        """Refuse a run on CPUs."""
        if job.parallel.use_cpu:
            text, keys = "Liger's layers are written in Triton and need a GPU", "and use_cpu"
            yield Problem(text, f"{OFF}, or use_cpu: false", f"use_liger_kernel {keys}")

    def check(self, facts: HardwareFacts) -> None:
        """Refuse nodes without a GPU or without the package."""
        require_package(facts, "use_liger_kernel", PACKAGE, OFF, REQUIREMENT)
        version = facts.versions[PACKAGE] or ""
        if Version(version) < Version(REQUIREMENT.partition(">=")[2]):
            raise ClusterError(
                f"use_liger_kernel needs {REQUIREMENT}: gradients of earlier ones are wrong or "
                "less precise (Liger-Kernel#1298, #1329)",
                f"node {facts.node_ip}, {PACKAGE} {version}",
                f"pip install '{REQUIREMENT}' on that node, or {OFF}",
            )
        require_gpu(facts, "Liger's layers are written in Triton and run on GPUs only", OFF)

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Apply Liger to a copy of the model, and return which modules it changed there."""
        self._check_model(model)
        trial = copy.deepcopy(model)
        for name, count in self._apply(trial).items():
            if not count and isinstance(self.use_liger_kernel, dict):
                raise JobError(
                    f"use_liger_kernel: {name}: true changes nothing in this model",
                    f"Liger has no {name} for {_model_type(model)}",
                    f"delete {name}",
                )
        now = self._kinds(trial)
        changes = {
            fqn: Change(class_name(module), now[fqn])
            for fqn, module in model.named_modules()
            if now[fqn] != self.what_is(module)
        }
        notes = (COMPILED,) if context.job.parallel.torch_compile else ()
        # Named kernels keep their modules; Liger's layers, if not named, are the fallback.
        gives_way_to = frozenset({"kernels"} if self.use_liger_kernel is True else ())
        return Plan(self.name, changes, notes=notes, gives_way_to=gives_way_to)

    @staticmethod
    def _check_model(model: nn.Module) -> None:
        try:
            from liger_kernel.transformers import monkey_patch
        except ImportError as error:
            raise JobError(
                f"use_liger_kernel needs the package {PACKAGE}, also where the plan is made",
                str(error),
                f"pip install {PACKAGE} here, or {OFF}",
            ) from error
        known = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
        kind = _model_type(model)
        if kind not in known:
            near = nearest(kind, known)
            raise JobError(
                f"Liger has no kernels for this model: {kind}",
                f"the nearest it has are {', '.join(near)}" if near else f"it has {len(known)}",
                OFF,
            )

    def prepare(self, model: nn.Module, plan: Plan) -> None:
        """Bind Liger's forward to the planned modules."""
        before = {fqn: vars(module).get("forward") for fqn, module in model.named_modules()}
        self._apply(model)
        for fqn, module in model.named_modules():
            if fqn in plan.changes or vars(module).get("forward") is before[fqn]:
                continue
            del module.forward
            if before[fqn] is not None:
                module.forward = before[fqn]

    def _apply(self, model: nn.Module) -> dict[str, int]:
        """Patch the model's instances, a kind of layer at a time; return how many each changed."""
        counts = {}
        for name in (name for name, wanted in self.layers.items() if wanted):
            before = self._kinds(model)
            with _globals_kept(model):
                _bind_rotary(model) if name == ROPE else _bind_layers(model, name)
            _bind_stand_ins(model)
            counts[name] = sum(before[fqn] != kind for fqn, kind in self._kinds(model).items())
        return counts

    def _kinds(self, model: nn.Module) -> dict[str, str]:
        return {fqn: self.what_is(module) for fqn, module in model.named_modules()}

    def what_is(self, module: nn.Module) -> str:
        """Return a module's class, and Liger's class or function where one is bound to it."""
        bound = own_forward(module)
        if _is_ligers(bound):
            return f"{class_name(module)} with Liger's {bound.__qualname__.partition('.')[0]}"
        rotary: Any = getattr(bound, "__globals__", {}).get(ROTARY)
        if _is_ligers(rotary):
            return f"{class_name(module)} with Liger's {rotary.__name__}"
        return class_name(module)

    def install(self, model: nn.Module, plan: Plan, worker: Worker) -> Plan:
        """Refuse layers that torch.compile would compile wrongly, and compare values and gradients
        of each kind of changed module with those of its class.
        """
        import torch

        from raytrain_adv.trial.module import Candidate, Untried, group_alike, try_module

        if worker.job.parallel.torch_compile:
            require_operators(model, plan)
        sentences = []
        fix = "set it to false in use_liger_kernel"
        layers = {fqn: change.after for fqn, change in plan.changes.items()}
        for layer, fqns in group_alike(model, layers):
            module: Any = model.get_submodule(fqns[0])
            name = layer.partition(" with ")[2] or layer
            forward = module.forward.__func__
            candidate = Candidate(forward, name, module, fix, worker.device, worker.dtype)
            try:
                sentences.append(try_module(candidate, name, len(fqns)).sentence)
            except Untried as error:
                sentences.append(f"{error.what}: {error.found}")
        torch.cuda.empty_cache()
        return plan.with_notes(*sentences)


def _model_type(model: nn.Module) -> str:
    config: Any = model.config
    return str(config.model_type)


def _bind_layers(model: nn.Module, name: str) -> None:
    from liger_kernel.transformers import monkey_patch

    apply = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN[_model_type(model)]
    known = signature(apply).parameters
    if name in known:
        apply(model=model, **{f: f == name for f in (*LAYERS, ROPE, *LOSSES) if f in known})


def _bind_stand_ins(model: nn.Module) -> None:
    """Make Liger's forward passes call operators that torch.compile compiles correctly."""
    from raytrain_adv.ops.liger_layers import STAND_INS

    of_forward: dict[FunctionType, FunctionType] = {}
    for module in model.modules():
        forward = own_forward(module)
        if not _is_ligers(forward):
            continue
        names = {name: STAND_INS[name] for name in forward.__code__.co_names if name in STAND_INS}
        if not names or all(forward.__globals__.get(name) is names[name] for name in names):
            continue
        if forward not in of_forward:
            own = _with_names(forward, names)
            own.__module__, own.__qualname__ = forward.__module__, forward.__qualname__
            of_forward[forward] = own
        module.forward = MethodType(of_forward[forward], module)


def _bind_rotary(model: nn.Module) -> None:
    """Give each attention module a forward with Liger's rotary function, which Liger itself puts
    into the whole process.
    """
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    of_class: dict[type, FunctionType] = {}
    for module in model.modules():
        forward = type(module).forward
        if not isinstance(forward, FunctionType) or ROTARY not in forward.__code__.co_names:
            continue
        if type(module) not in of_class:
            of_class[type(module)] = _with_names(forward, {ROTARY: liger_rotary_pos_emb})
        module.forward = MethodType(of_class[type(module)], module)


def require_operators(model: nn.Module, plan: Plan) -> None:
    """Refuse layers that torch.compile would compile wrongly. Raises JobError for a layer of
    Liger's that calls a kernel without an operator in ops/liger_layers.py.
    """
    from raytrain_adv.ops.liger_layers import STAND_INS, UNDERSTOOD

    for fqn in plan.changes:
        forward = own_forward(model.get_submodule(fqn))
        if not _is_ligers(forward):
            continue  # an attention module's own, which rotates by Liger's function
        names = set(forward.__code__.co_names) - {*STAND_INS, *UNDERSTOOD}
        if any(_is_ligers(forward.__globals__.get(name)) for name in names):
            kind = forward.__qualname__.partition(".")[0]
            raise JobError(
                f"torch_compile may compile Liger's {kind} wrongly",
                "it does not see what Liger's kernels write to, and raytrain_adv has no operator "
                "that declares it for this one",
                "set torch_compile: false, or name the layers to take without it, as in "
                "use_liger_kernel: {rms_norm: true}",
            )


def _is_ligers(value: object) -> bool:
    return str(getattr(value, "__module__", "")).startswith("liger_kernel.")


def _with_names(function: FunctionType, values: dict[str, Any]) -> FunctionType:
    """Return a copy of a function with other values of global names.

    torch.compile caches by code object, and puts what that calls into the globals of the first
    frame: each code object must have exactly one globals.
    """
    names = {**function.__globals__, **values}
    # torch.compile would look globals up in the module of this name, which lacks ours.
    names.pop("__name__", None)
    code, defaults = function.__code__.replace(), function.__defaults__
    own = FunctionType(code, names, function.__name__, defaults, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return own


@contextmanager
def _globals_kept(model: nn.Module) -> Iterator[None]:
    """Undo what Liger changes in the modules that the model's classes come from."""
    types = {type(m) for m in model.modules()}
    names = {home: dict(vars(home)) for home in {sys.modules[kind.__module__] for kind in types}}
    forwards = {kind: vars(kind)["forward"] for kind in types if "forward" in vars(kind)}
    try:
        yield
    finally:
        for home, values in names.items():
            for name in vars(home).keys() - values.keys():
                delattr(home, name)
            for name, value in values.items():
                if vars(home).get(name) is not value:
                    setattr(home, name, value)
        for kind, forward in forwards.items():
            if vars(kind)["forward"] is not forward:
                kind.forward = forward
