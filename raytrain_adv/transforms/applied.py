"""A job's enabled transforms: plan, refuse conflicts, prepare, and verify that it happened."""

from __future__ import annotations

import copy
import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from raytrain_adv.config import JobConfig
from raytrain_adv.config.problems import show
from raytrain_adv.config.rules import switch
from raytrain_adv.errors import ClusterError, JobError, TrainingError
from raytrain_adv.transforms.transform import Plan, Transform

if TYPE_CHECKING:
    import torch
    from torch import nn

    from raytrain_adv.hardware import HardwareFacts

NAMED = 4
"""Modules named in a message before it says how many more there are."""


class Transforms:
    """The transforms a job enables, in the order in which they are applied."""

    def __init__(self, job: JobConfig) -> None:
        self.job = job
        self._enabled = tuple(t for t in job.transforms if isinstance(t, Transform) and t.enabled)

    def __iter__(self) -> Iterator[Transform]:
        """Iterate over the transforms."""
        return iter(self._enabled)

    def __len__(self) -> int:
        """Return how many transforms are enabled."""
        return len(self._enabled)

    def check(self, facts: HardwareFacts) -> None:
        """Check that a worker's machine and software can do what the job enables.

        Raises:
            ClusterError: naming the rule that refused, or the package that cannot be imported.
        """
        check_all(self.job, facts)

    def check_length(self, total_steps: int) -> None:
        """Check that the transforms' keys fit a run of so many optimizer steps.

        Raises:
            JobError: naming the key and what would fit.
        """
        for transform in self:
            transform.check_length(total_steps)

    def fetch(self, facts: HardwareFacts, say: Callable[[str], None]) -> None:
        """Put what transforms need on the workers into output_dir.

        Raises:
            JobError: when it is not available.
        """
        fetch_all(self.job, facts, say)

    def plan(
        self,
        model: nn.Module,
        facts: HardwareFacts | None = None,
        num_tokens: int | None = None,
    ) -> dict[str, Plan]:
        """Return what each transform would change, by its name; leave the model unchanged.

        A later transform is planned on a copy that the earlier ones have changed, so the model
        should be on the meta device, where a copy costs no memory.

        Args: as `prepare`.

        Raises:
            JobError: when plans change nothing, or two transforms want the same module; it names
                all that is wrong.
        """
        return self.prepare(copy.deepcopy(model), facts, num_tokens)

    def prepare(
        self,
        model: nn.Module,
        facts: HardwareFacts | None = None,
        num_tokens: int | None = None,
    ) -> dict[str, Plan]:
        """Apply each transform to the model in place: plan, prepare, verify. Return the plans.

        Args:
            model: the model before any transform.
            facts: the machine the job runs on; none means this one.
            num_tokens: tokens of one worker's forward pass, if known; plans then contain advice.

        Raises:
            JobError: when plans change nothing, or two transforms want the same module; it names
                all that is wrong.
            TrainingError: when a transform did not do what it had planned.
        """
        plans = prepare_all(self.job, model, facts)
        return plans if num_tokens is None else with_advice(self.job, plans, num_tokens)

    def install(
        self,
        model: nn.Module,
        plans: Mapping[str, Plan],
        device: torch.device,
        dtype: torch.dtype,
    ) -> dict[str, Plan]:
        """Finish the changes on a worker: replace planned forward passes, and try what was changed
        on the device that trains. Return the plans with what was found.

        Raises:
            JobError: when a replacement turns out to be wrong.
            TrainingError: when a transform did not do what it had planned.
        """
        plans = install_all(self.job, model, plans, device, dtype)
        return probe_all(self.job, model, plans, device, dtype)

    def before_sharding(self, model: nn.Module) -> None:
        """Change how FSDP2 will shard and gather; call it only if the model will be sharded."""
        for transform in self:
            transform.before_sharding(model)

    def initialize(self, model: nn.Module, plans: Mapping[str, Plan], seed: int) -> dict[str, Plan]:
        """Give values to parameters that transforms added, and compare weights that they changed
        with those that were read. Call it on all ranks once the model's weights are loaded and
        sharded. Return the plans with what was found.

        Raises:
            TrainingError: on all ranks, when weights differ from those that were read.
        """
        for transform in self:
            transform.initialize(model, seed)
        return loaded_all(self.job, model, plans)

    def begin_step(self, model: nn.Module, step: int) -> None:
        """Bring the model into its state for optimizer step `step` (from 0)."""
        for transform in self:
            transform.begin_step(model, step)

    def begin_batch(
        self, model: nn.Module, step: int, first: int, segments: tuple[tuple[int, ...], ...]
    ) -> None:
        """Prepare for a micro-batch's forward pass.

        Args:
            model: the model.
            step: optimizer step (from 0).
            first: place of the batch's first sequence among all of the step, over all workers.
            segments: of each sequence the tokens of the conversations in it; padding follows.
        """
        for transform in self:
            transform.begin_batch(model, step, first, segments)

    def after_step(self, model: nn.Module) -> None:
        """Follow up on new parameter values: after each optimizer step and after each load."""
        for transform in self:
            transform.after_step(model)

    def switch(self, model: nn.Module, on: bool) -> None:
        """Turn every transform that can be switched on or off."""
        for transform in self:
            transform.switch(model, on)

    def switched_at(self, step: int) -> list[str]:
        """Return a sentence for each transform that turns on or off with optimizer step `step`
        (from 0).
        """
        return [t.switched(step) for t in self if t.is_on(step) != t.is_on(step - 1)]

    def remedies(self, step: int) -> tuple[str, ...]:
        """Return what the transforms suggest if the loss went wrong in step `step` (from 0)."""
        return tuple(filter(None, (t.remedy(step) for t in self)))

    def evaluated_as(self) -> str:
        """Return how held-out rows are evaluated, as `fake-quantized`; empty for nothing special."""
        return ", ".join(t.evaluated_as for t in self if t.evaluated_as)

    def twins(self) -> Iterator[JobConfig]:
        """Yield the jobs without one of the features that are trained before this one, to measure
        it by; each has its own output_dir.
        """
        for transform in self:
            folder = transform.twin_dir(self.job.output.output_dir)
            if folder is None:
                continue
            output = self.job.output.model_copy(
                update={
                    "output_dir": folder,
                    "resume_from_checkpoint": (
                        None if self.job.output.overwrite_output_dir else True
                    ),
                    "compare_with": None,
                    "export_model": True,  # what this run will be measured by
                    "num_sample_answers": 0,
                }
            )
            # It is called the bf16 twin: FP8 is off in it too.
            off = (transform.name, "fp8")
            others = tuple(
                type(t)() if isinstance(t, Transform) and t.name in off else t
                for t in self.job.transforms
            )
            yield replace(self.job, output=output, transforms=others)


def enabled(job: JobConfig) -> list[Transform]:
    """Return the transforms the job asks for, in the order in which they are applied."""
    return list(Transforms(job))


def check_all(job: JobConfig, facts: HardwareFacts) -> None:
    """Check on a worker that this machine and its software can do what the job asks for.

    Raises:
        ClusterError: naming the rule that refused, or the package that cannot be imported.
    """
    for transform in enabled(job):
        transform.check(facts)
        for package in transform.imports:
            try:
                importlib.import_module(package)
            except (ImportError, OSError) as error:
                version = facts.versions.get(package.replace("_", "-")) or "of unknown version"
                off = f"{switch(transform)}: {show(type(transform).default(switch(transform)))}"
                raise ClusterError(
                    f"{type(transform).feature} needs {package}: {package} not available",
                    f"node {facts.node_ip}, {package} {version} cannot be imported: {error}",
                    f"install it anew on that node, with the versions of constraints.txt, or set "
                    f"{off}",
                ) from error


def plan_all(
    job: JobConfig, model: nn.Module, facts: HardwareFacts | None = None
) -> dict[str, Plan]:
    """Return what each enabled transform would change, by its name; the model is left as it is.

    A later transform is planned on a copy that the earlier ones have changed, so the model should
    be on the meta device, where a copy costs no memory.

    Args:
        job: the resolved job.
        model: the model before any transform.
        facts: the machine the job will run on; none means this one.

    Raises:
        JobError: when plans change nothing, or two transforms want the same module; it names all
            that is wrong.
    """
    if not enabled(job):
        return {}
    return prepare_all(job, copy.deepcopy(model), facts)


def prepare_all(
    job: JobConfig, model: nn.Module, facts: HardwareFacts | None = None
) -> dict[str, Plan]:
    """Apply every enabled transform to the model in place, each one planned, prepared and verified.

    Raises:
        JobError: when plans change nothing, or two transforms want the same module; it names all
            that is wrong.
        TrainingError: when a transform did not do what it had planned.
    """
    plans: dict[str, Plan] = {}
    errors: list[JobError] = []
    for transform in enabled(job):
        try:
            plans[transform.name] = _prepare(transform, job, model, facts, plans)
        except JobError as error:
            errors.append(_after_the_machines(error, transform, facts or _this_machine()))
    if errors:
        raise _together(errors)
    return plans


def _after_the_machines(error: JobError, transform: Transform, machine: HardwareFacts) -> JobError:
    """Return a plan's refusal behind that of the machine, where it refuses too: a run there would
    end in that one.
    """
    try:
        transform.check(machine)
    except ClusterError as refusal:
        return JobError(
            f"{refusal.what}; and {error.what}",
            f"{refusal.found}\n{error.found}",
            f"{refusal.fix}\n{error.fix}",
        )
    return error


def _together(errors: list[JobError]) -> JobError:
    """Return one error that says all that several say."""
    if len(errors) == 1:
        return errors[0]
    return JobError(
        f"{len(errors)} features cannot be had as the job asks for them",
        "\n".join(f"{error.what}: {error.found}" for error in errors),
        "\n".join(dict.fromkeys(error.fix for error in errors)),
    )


def _prepare(
    transform: Transform,
    job: JobConfig,
    model: nn.Module,
    facts: HardwareFacts | None,
    earlier: Mapping[str, Plan],
) -> Plan:
    machine = facts or _this_machine()
    plan = give_way(transform, transform.plan_for(job, model, machine), earlier)
    refuse_empty(transform, plan)
    refuse_conflict(transform, plan, earlier)
    before = kinds(model, transform)
    transform.prepare(model, plan, machine)
    verify(transform, model, plan, before)
    return plan


def fetch_all(job: JobConfig, facts: HardwareFacts, say: Callable[[str], None]) -> None:
    """Bring what transforms need on the workers into output_dir.

    Raises:
        JobError: when it cannot be had.
    """
    for transform in enabled(job):
        transform.fetch(job, facts, say)


def install_all(
    job: JobConfig,
    model: nn.Module,
    plans: Mapping[str, Plan],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Plan]:
    """Replace the planned forward passes on a worker, each transform's verified; return the plans
    with what was found.

    Raises:
        JobError: when a replacement turns out to be wrong.
        TrainingError: when a transform did not do what it had planned.
    """
    installed: dict[str, Plan] = {}
    for transform in enabled(job):
        before = own_forwards(model)
        plan = transform.install(model, plans[transform.name], job, device, dtype)
        verify_forwards(model, plan, before)
        installed[transform.name] = plan
    return installed


def probe_all(
    job: JobConfig,
    model: nn.Module,
    plans: Mapping[str, Plan],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Plan]:
    """Try what each transform changed on the device that trains; return the plans with what was
    found.

    Raises:
        TrainingError: when a changed module does not do what it stands for.
    """
    found = {t.name: t.probe(model, plans[t.name], device, dtype) for t in enabled(job)}
    return {name: replace(plan, notes=plan.notes + found[name]) for name, plan in plans.items()}


def loaded_all(job: JobConfig, model: nn.Module, plans: Mapping[str, Plan]) -> dict[str, Plan]:
    """Hold what was loaded to what each transform has made of it; return the plans with what was
    found.

    Raises:
        TrainingError: when weights do not stand for those that were read.
    """
    found = {t.name: t.loaded(model, plans[t.name]) for t in enabled(job)}
    return {name: replace(plan, notes=plan.notes + found[name]) for name, plan in plans.items()}


def with_advice(job: JobConfig, plans: Mapping[str, Plan], num_tokens: int) -> dict[str, Plan]:
    """Return the plans, with what the job's other keys mean for each transform among their notes.

    Args:
        job: the resolved job.
        plans: by transform.
        num_tokens: tokens of one worker's forward pass.
    """
    advice = {t.name: t.advice(job, num_tokens) for t in enabled(job)}
    return {name: replace(plan, notes=plan.notes + advice[name]) for name, plan in plans.items()}


def _this_machine() -> HardwareFacts:
    from raytrain_adv import hardware

    return hardware.detect()


def kinds(model: nn.Module, transform: Transform) -> dict[str, str]:
    """Return what every module is by fqn, in the transform's words."""
    return {fqn: transform.what_is(module) for fqn, module in model.named_modules()}


def refuse_empty(transform: Transform, plan: Plan) -> None:
    """Refuse a plan that changes nothing: the job asked for something it would not get.

    Raises:
        JobError: with the reasons for which modules were passed over.
    """
    if plan.changes or plan.empty_because:
        return
    reasons = Counter(plan.skipped.values())
    raise JobError(
        f"{transform.name} was asked for and would change nothing",
        "\n".join(f"{count} modules: {reason}" for reason, count in reasons.most_common(NAMED))
        or "no module of the model is of a kind it changes",
        f"turn it off, or change its keys: {', '.join(type(transform).model_fields)}",
    )


def give_way(transform: Transform, plan: Plan, earlier: Mapping[str, Plan]) -> Plan:
    """Return the plan without the modules that this transform leaves to earlier ones."""
    left = {
        fqn: f"computed by {name}"
        for name in sorted(transform.gives_way_to & earlier.keys())
        for fqn in plan.changes
        if _touches(fqn, earlier[name].changes)
    }
    kept = {fqn: change for fqn, change in plan.changes.items() if fqn not in left}
    return replace(plan, changes=kept, skipped={**plan.skipped, **left})


def refuse_conflict(transform: Transform, plan: Plan, earlier: Mapping[str, Plan]) -> None:
    """Refuse to change a module that an earlier transform changed, or one that contains or is part
    of such a one.

    Raises:
        JobError: naming both transforms and the modules, unless this transform stacks on the
            earlier one.
    """
    for name, other in earlier.items():
        if name in transform.stacks_on:
            continue
        shared = [fqn for fqn in plan.changes if _touches(fqn, other.changes)]
        if shared:
            raise JobError(
                f"{transform.name} and {name} would both change the same modules",
                f"{len(shared)} of them: {listed(shared)}",
                f"turn one of the two off, or keep {transform.name} away from what {name} changes",
            )


def _touches(fqn: str, owned: Mapping[str, object]) -> bool:
    if fqn in owned or any(parent in owned for parent in _parents(fqn)):
        return True
    return fqn != "" and any(other.startswith(f"{fqn}.") for other in owned)


def _parents(fqn: str) -> Iterator[str]:
    while "." in fqn:
        fqn = fqn.rpartition(".")[0]
        yield fqn


def verify(transform: Transform, model: nn.Module, plan: Plan, before: Mapping[str, str]) -> None:
    """Check the model against the plan: what was planned is there, and nothing else was changed to
    its classes.

    Raises:
        TrainingError: naming the modules that differ.
    """
    now = kinds(model, transform)
    due = {
        fqn: change.after if change.part == "class" else change.before
        for fqn, change in plan.changes.items()
    }
    wrong = [
        f"{fqn} is {now.get(fqn, 'gone')}, planned {kind}"
        for fqn, kind in due.items()
        if now.get(fqn) != kind
    ]
    planned = {due[fqn] for fqn, change in plan.changes.items() if due[fqn] != change.before}
    stray = [
        f"{fqn} became {kind}, which was not planned"
        for fqn, kind in now.items()
        if kind in planned and fqn not in plan.changes and before.get(fqn) != kind
    ]
    _refuse_differences(plan, wrong + stray)


def own_forwards(model: nn.Module) -> dict[str, object]:
    """Return the function of each forward pass that a module has beside its class's."""
    found = {fqn: vars(module).get("forward") for fqn, module in model.named_modules()}
    return {fqn: getattr(f, "__func__", f) for fqn, f in found.items() if f is not None}


def verify_forwards(model: nn.Module, plan: Plan, before: Mapping[str, object]) -> None:
    """Check that the planned forward passes were replaced, and no others.

    Raises:
        TrainingError: naming the modules that differ.
    """
    now = own_forwards(model)
    planned = {fqn: c.after for fqn, c in plan.changes.items() if c.part == "forward"}
    wrong = [
        f"{fqn} has the forward pass it had, planned {after}"
        for fqn, after in planned.items()
        if now.get(fqn) is before.get(fqn) or now[fqn] is type(model.get_submodule(fqn)).forward
    ]
    stray = [
        f"{fqn} has another forward pass, which was not planned"
        for fqn in now.keys() | before.keys()
        if fqn not in planned and now.get(fqn) is not before.get(fqn)
    ]
    _refuse_differences(plan, wrong + sorted(stray))


def _refuse_differences(plan: Plan, lines: list[str]) -> None:
    if lines:
        raise TrainingError(
            f"{plan.transform} did not do what it had planned",
            f"{len(lines)} modules differ: {listed(lines)}",
            "this is a defect of raytrain_adv or of the versions installed: compare them with "
            "constraints.txt",
        )


def listed(names: list[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def report(plans: Mapping[str, Plan]) -> dict[str, Any]:
    """Return the plans for report.json: per transform what was changed and skipped, with classes
    and reasons.
    """
    return {name: _entry(plan) for name, plan in plans.items()}


def _entry(plan: Plan) -> dict[str, Any]:
    skipped: dict[str, list[str]] = {}
    for fqn, reason in plan.skipped.items():
        skipped.setdefault(reason, []).append(fqn)
    kinds = Counter(f"{change.before} -> {change.after}" for change in plan.changes.values())
    return {
        "changed": len(plan.changes),
        "skipped": len(plan.skipped),
        "changed_by_class": dict(kinds),
        "changed_modules": list(plan.changes),
        "skipped_reasons": skipped,
        "notes": list(plan.notes),
    }
