"""A job's enabled transforms: plan, refuse conflicts, prepare, and verify that it happened."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from raytrain_adv import hardware
from raytrain_adv.config import JobConfig
from raytrain_adv.config.problems import show
from raytrain_adv.config.rules import switch
from raytrain_adv.errors import ClusterError, JobError, TrainingError
from raytrain_adv.text import listed
from raytrain_adv.transforms.coverage import coverage
from raytrain_adv.transforms.modules import nothing_changed, own_forward
from raytrain_adv.transforms.transform import (
    DEFECT,
    Context,
    Gathering,
    Plan,
    Switchable,
    Transform,
    Worker,
    title_of,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from raytrain_adv.hardware import HardwareFacts
    from raytrain_adv.ops.noise import Segments


class Transforms:
    """The transforms a job enables, in the order in which they are applied."""

    def __init__(self, job: JobConfig) -> None:
        self.job = job
        self._enabled = tuple(t for t in job.transforms if isinstance(t, Transform) and t.enabled)
        self.switchable = tuple(t for t in self._enabled if isinstance(t, Switchable))

    def __iter__(self) -> Iterator[Transform]:
        """Iterate over the transforms."""
        return iter(self._enabled)

    def check(self, facts: HardwareFacts) -> None:
        """Check that a worker's machine and software can do what the job enables. Raises
        ClusterError naming the rule that refused, or the package that cannot be imported.
        """
        for transform in self:
            transform.check(facts)
            for package in transform.imports:
                _require_import(transform, package, facts)

    def check_length(self, total_steps: int) -> None:
        """Check that the transforms' keys fit a run of so many optimizer steps."""
        for transform in self:
            transform.check_length(total_steps)

    def fetch(self, facts: HardwareFacts, say: Callable[[str], None]) -> None:
        """Put what the transforms need on the workers into output_dir."""
        for transform in self:
            transform.fetch(self.job, facts, say)

    def plan(
        self, model: nn.Module, facts: HardwareFacts | None = None, num_tokens: int | None = None
    ) -> dict[str, Plan]:
        """Return the plans of `prepare` without changing the model: transforms are planned on a
        copy, which costs no memory on the meta device.
        """
        return self.prepare(copy.deepcopy(model), facts, num_tokens) if self._enabled else {}

    def prepare(
        self, model: nn.Module, facts: HardwareFacts | None = None, num_tokens: int | None = None
    ) -> dict[str, Plan]:
        """Apply each transform to the model in place: plan, prepare, verify. Return the plans by
        the transforms' names. `facts` describe the machine the job runs on, by default this one;
        plans advise on `num_tokens` of one worker's forward pass. Raises JobError when plans change
        nothing, or two transforms want the same module; it names all that is wrong; TrainingError
        when a transform did not do what it had planned.
        """
        context = Context(self.job, facts or hardware.detect(), num_tokens)
        plans: dict[str, Plan] = {}
        errors: list[JobError] = []
        for transform in self:
            try:
                plan = _give_way(transform.plan(model, context), plans)
                _refuse_empty(transform, plan, model)
                self._refuse_conflict(transform, plan, plans)
                plan = _with_coverage(transform, plan, model)
                before = _kinds(model, transform)
                transform.prepare(model, plan)
                _verify(transform, model, plan, before)
                plans[transform.name] = plan
            except JobError as error:
                errors.append(_after_the_machine(error, transform, context.facts))
        if errors:
            raise _together(errors)
        return plans

    def _refuse_conflict(
        self, transform: Transform, plan: Plan, earlier: Mapping[str, Plan]
    ) -> None:
        """Refuse to change a module that an earlier transform changed, or one that contains or is
        part of one, unless this transform stacks on the earlier one.
        """
        for other in self:
            if other.name not in earlier or {other.name, other.stage} & transform.stacks_on:
                continue
            shared = [f for f in plan.changes if _touches(f, earlier[other.name].changes)]
            if shared:
                raise JobError(
                    f"{transform.name} and {other.name} would both change the same modules",
                    f"{len(shared)} of them: {listed(shared)}",
                    f"turn one of the two off, or keep {transform.name} away from what "
                    f"{other.name} changes",
                )

    def install(
        self, model: nn.Module, plans: Mapping[str, Plan], device: torch.device, dtype: torch.dtype
    ) -> dict[str, Plan]:
        """Finish the changes on a worker: replace planned forward passes, and try what was changed
        on the device that trains. Return the plans with what was found. Raises JobError when a
        replacement is wrong; TrainingError when a transform did not do what it had planned, or a
        changed module computes something else than it should.
        """
        found: dict[str, Plan] = {}
        worker = Worker(self.job, device, dtype)
        for transform in self:
            before = {fqn: own_forward(module) for fqn, module in model.named_modules()}
            plan = transform.install(model, plans[transform.name], worker)
            _verify_forwards(model, plan, before)
            found[transform.name] = plan
        return found

    def before_sharding(self, model: nn.Module) -> None:
        """Change how FSDP2 will shard and gather; call it only if the model will be sharded."""
        for transform in self:
            transform.before_sharding(model)

    def gathering(self, model: nn.Module) -> Iterator[Gathering]:
        """Yield how each transform changes what FSDP2 gathers."""
        return (transform.gathering(model) for transform in self)

    def initialize(self, model: nn.Module, plans: Mapping[str, Plan], seed: int) -> dict[str, Plan]:
        """Initialize the parameters that transforms added, and check the weights they changed, on
        all ranks. Return the plans with what was found.
        """
        return {
            t.name: plans[t.name].with_notes(*t.initialize(model, plans[t.name], seed))
            for t in self
        }

    @property
    def converts(self) -> str:
        """Suffix of the folder that is exported next to the trained model; empty for none."""
        return next((t.converts for t in self if t.converts), "")

    def begin_step(self, model: nn.Module, step: int) -> None:
        """Bring the model into its state for optimizer step `step` (from 0)."""
        for transform in self.switchable:
            transform.switch(model, transform.is_on(step))

    def begin_batch(self, model: nn.Module, step: int, first: int, segments: Segments) -> None:
        """Prepare for a micro-batch's forward pass."""
        for transform in self:
            transform.begin_batch(model, step, first, segments)

    def after_step(self, model: nn.Module) -> None:
        """Follow up on new parameter values: after each optimizer step and after each load."""
        for transform in self:
            transform.after_step(model)

    def switch(self, model: nn.Module, on: bool) -> None:
        """Turn every transform that can be switched on or off."""
        for transform in self.switchable:
            transform.switch(model, on)

    def on_at(self, step: int) -> tuple[bool, ...]:
        """Return which transforms that can be switched are on in a step (from 0)."""
        return tuple(transform.is_on(step) for transform in self.switchable)

    def switched_at(self, step: int) -> list[str]:
        """Return a sentence for each transform that turns on or off with this step (from 0)."""
        return [
            f"{title_of(t)} is {'on' if t.is_on(step) else 'off'} from step {step + 1:,}"
            for t in self.switchable
            if t.is_on(step) != t.is_on(step - 1)
        ]

    def remedies(self, step: int) -> tuple[str, ...]:
        """Return what the transforms suggest if the loss went wrong in step `step` (from 0)."""
        return tuple(filter(None, (t.remedy(step) for t in self.switchable)))

    def evaluated_as(self) -> str:
        """Return how held-out rows are evaluated; empty if just as the model is trained."""
        return ", ".join(t.evaluated_as for t in self.switchable)

    def twins(self) -> Iterator[JobConfig]:
        """Yield the jobs without a feature that are trained before this one, to measure it by. A
        twin that is complete is not trained again; one that was interrupted resumes.
        """
        output = self.job.output
        for suffix, out in filter(None, (t.twin() for t in self.switchable)):
            keys = {
                "output_dir": f"{output.output_dir.rstrip('/')}-{suffix}",
                "resume_from_checkpoint": None if output.overwrite_output_dir else True,
                "compare_with": None,
                "export_model": True,  # what this run will be measured by
                "num_sample_answers": 0,
            }
            transforms = tuple(
                type(t)() if isinstance(t, Transform) and t.name in out else t
                for t in self.job.transforms
            )
            yield replace(self.job, transforms=transforms, output=output.model_copy(update=keys))


def _require_import(transform: Transform, package: str, facts: HardwareFacts) -> None:
    try:
        importlib.import_module(package)
    except (ImportError, OSError) as error:
        version = facts.versions.get(package.replace("_", "-")) or "of unknown version"
        key = switch(transform)
        raise ClusterError(
            f"{title_of(transform)} needs {package}: {package} not available",
            f"node {facts.node_ip}, {package} {version} cannot be imported: {error}",
            f"reinstall it on that node, with the versions of constraints.txt, or set "
            f"{key}: {show(transform.default(key))}",
        ) from error


def _after_the_machine(error: JobError, transform: Transform, machine: HardwareFacts) -> JobError:
    """Return a plan's error after that of the machine, if it refuses too."""
    try:
        transform.check(machine)
    except ClusterError as refusal:
        found, fix = f"{refusal.found}\n{error.found}", f"{refusal.fix}\n{error.fix}"
        return JobError(f"{refusal.what}; and {error.what}", found, fix)
    return error


def _together(errors: list[JobError]) -> JobError:
    """Return one error with the texts of several."""
    if len(errors) == 1:
        return errors[0]
    found = "\n".join(f"{error.what}: {error.found}" for error in errors)
    fix = "\n".join(dict.fromkeys(error.fix for error in errors))
    return JobError(f"{len(errors)} features cannot be enabled as configured", found, fix)


def _kinds(model: nn.Module, transform: Transform) -> dict[str, str]:
    return {fqn: transform.what_is(module) for fqn, module in model.named_modules()}


def _refuse_empty(transform: Transform, plan: Plan, model: nn.Module) -> None:
    """Refuse a plan that changes nothing: the job would train without a feature it enables."""
    if not plan.changes and not plan.empty_because:
        what = f"{transform.name} is enabled but would not change any module"
        keys = f"change its keys: {', '.join(type(transform).model_fields)}"
        raise nothing_changed(
            what, model if transform.covers else None, plan.skipped, keys, "turn it off"
        )


def _with_coverage(transform: Transform, plan: Plan, model: nn.Module) -> Plan:
    """Return the plan with the share of the model that it changes; under half is a warning."""
    if not transform.covers:
        return plan
    found = coverage(model, plan.changes)
    share = found.weights if transform.covers == "weights" else found.flops
    warning = "warning: under half of the model: " if share < 0.5 else ""
    details = {**plan.details, "coverage": found.as_dict()}
    return replace(plan, details=details).with_notes(
        f"{warning}{title_of(transform)} covers {found}"
    )


def _give_way(plan: Plan, earlier: Mapping[str, Plan]) -> Plan:
    """Return the plan without the modules that it leaves to earlier transforms."""
    left = {
        fqn: f"computed by {name}"
        for name in sorted(plan.gives_way_to & earlier.keys())
        for fqn in plan.changes
        if _touches(fqn, earlier[name].changes)
    }
    kept = {fqn: change for fqn, change in plan.changes.items() if fqn not in left}
    return replace(plan, changes=kept, skipped={**plan.skipped, **left})


def _touches(fqn: str, owned: Mapping[str, object]) -> bool:
    """Whether a module, unless it is the whole model, is, contains or is part of one of these."""
    parts, inside = fqn.split("."), f"{fqn}."
    above = {".".join(parts[: n + 1]) for n in range(len(parts))}
    return not above.isdisjoint(owned) or any(other.startswith(inside) for other in owned)


def _verify(transform: Transform, model: nn.Module, plan: Plan, before: Mapping[str, str]) -> None:
    """Compare the model with the plan: what was planned is there, and no other module has become
    one of the planned classes.
    """
    now = _kinds(model, transform)
    due = {f: c.after if c.part == "class" else c.before for f, c in plan.changes.items()}
    other = {fqn: kind for fqn, kind in due.items() if now.get(fqn) != kind}
    wrong = [f"{fqn} is {now.get(fqn, 'gone')}, planned {kind}" for fqn, kind in other.items()]
    planned = {due[fqn] for fqn, change in plan.changes.items() if due[fqn] != change.before}
    stray = [
        f"{fqn} became {kind}, which was not planned"
        for fqn, kind in now.items()
        if kind in planned and fqn not in plan.changes and before.get(fqn) != kind
    ]
    _refuse_differences(plan, wrong + stray)


def _verify_forwards(model: nn.Module, plan: Plan, before: Mapping[str, object]) -> None:
    """Check that the planned forward passes were replaced, and no others."""
    modules = dict(model.named_modules())
    now = {fqn: own_forward(module) for fqn, module in modules.items()}
    planned = {fqn: c.after for fqn, c in plan.changes.items() if c.part == "forward"}
    wrong = [
        f"{fqn} has the forward pass it had, planned {after}"
        for fqn, after in planned.items()
        if now[fqn] is before[fqn] or now[fqn] is type(modules[fqn]).forward
    ]
    stray = [
        f"{fqn} has another forward pass, which was not planned"
        for fqn in now
        if fqn not in planned and now[fqn] is not before.get(fqn)
    ]
    _refuse_differences(plan, wrong + stray)


def _refuse_differences(plan: Plan, lines: list[str]) -> None:
    if lines:
        found = f"{len(lines)} modules differ: {listed(lines)}"
        raise TrainingError(f"{plan.transform} did not do what it had planned", found, DEFECT)
