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
from raytrain_adv.errors import ClusterError, JobError
from raytrain_adv.transforms.transform import Context, Plan, Transform
from raytrain_adv.transforms.verify import (
    give_way,
    kinds,
    own_forwards,
    refuse_conflict,
    refuse_empty,
    verify,
    verify_forwards,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from raytrain_adv.hardware import HardwareFacts


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
        for transform in self:
            transform.check(facts)
            for package in transform.imports:
                _require_import(transform, package, facts)

    def check_length(self, total_steps: int) -> None:
        """Check that the transforms' keys fit a run of so many optimizer steps.

        Raises:
            JobError: naming the key and what would fit.
        """
        for transform in self:
            transform.check_length(total_steps)

    def fetch(self, facts: HardwareFacts, say: Callable[[str], None]) -> None:
        """Put what the transforms need on the workers into output_dir.

        Raises:
            JobError: when it is not available.
        """
        for transform in self:
            transform.fetch(self.job, facts, say)

    def plan(
        self,
        model: nn.Module,
        facts: HardwareFacts | None = None,
        num_tokens: int | None = None,
    ) -> dict[str, Plan]:
        """Return what each transform would change, by its name; leave the model unchanged.

        A later transform is planned on a copy that the earlier ones have changed, so the model
        should be on the meta device, where a copy costs no memory. Arguments and errors are those
        of `prepare`.
        """
        return self.prepare(copy.deepcopy(model), facts, num_tokens) if len(self) else {}

    def prepare(
        self,
        model: nn.Module,
        facts: HardwareFacts | None = None,
        num_tokens: int | None = None,
    ) -> dict[str, Plan]:
        """Apply each transform to the model in place: plan, prepare, verify. Return the plans by
        the transforms' names.

        Args:
            model: the model before any transform.
            facts: the machine the job runs on; none means this one.
            num_tokens: tokens of one worker's forward pass, if known; plans advise on them.

        Raises:
            JobError: when plans change nothing, or two transforms want the same module; it names
                all that is wrong.
            TrainingError: when a transform did not do what it had planned.
        """
        context = Context(self.job, facts or hardware.detect(), num_tokens)
        plans: dict[str, Plan] = {}
        errors: list[JobError] = []
        for transform in self:
            try:
                plan = give_way(transform.plan(model, context), plans)
                refuse_empty(transform, plan)
                refuse_conflict(transform, plan, self._stages(plans))
                before = kinds(model, transform)
                transform.prepare(model, plan)
                verify(transform, model, plan, before)
                plans[transform.name] = plan
            except JobError as error:
                errors.append(_after_the_machine(error, transform, context.facts))
        if errors:
            raise _together(errors)
        return plans

    def install(
        self, model: nn.Module, plans: Mapping[str, Plan], device: torch.device, dtype: torch.dtype
    ) -> dict[str, Plan]:
        """Finish the changes on a worker: replace planned forward passes, and try what was changed
        on the device that trains. Return the plans with what was found.

        Raises:
            JobError: when a replacement is wrong.
            TrainingError: when a transform did not do what it had planned, or a changed module
                computes something else than it should.
        """
        found: dict[str, Plan] = {}
        for transform in self:
            before = own_forwards(model)
            plan = transform.install(model, plans[transform.name], self.job, device, dtype)
            verify_forwards(model, plan, before)
            found[transform.name] = plan
        return found

    def before_sharding(self, model: nn.Module) -> None:
        """Change how FSDP2 will shard and gather; call it only if the model will be sharded."""
        for transform in self:
            transform.before_sharding(model)

    def gathered(self, model: nn.Module) -> dict[nn.Parameter, int]:
        """Return the parameters that FSDP2 gathers in another dtype than the compute dtype, with
        the bytes of one number.
        """
        return dict(pair for transform in self for pair in transform.gathered(model))

    def initialize(self, model: nn.Module, plans: Mapping[str, Plan], seed: int) -> dict[str, Plan]:
        """Give values to parameters that transforms added, and compare weights that they changed
        with those that were read. Call it on all ranks once the model's weights are loaded and
        sharded. Return the plans with what was found.

        Raises:
            TrainingError: on all ranks, when weights differ from those that were read.
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
        for transform in self:
            transform.switch(model, transform.is_on(step))

    def begin_batch(
        self, model: nn.Module, step: int, first: int, segments: tuple[tuple[int, ...], ...]
    ) -> None:
        """Prepare for a micro-batch's forward pass; arguments as for Transform.begin_batch."""
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
        return [
            f"{t.feature or t.name} is {'on' if t.is_on(step) else 'off'} from step {step + 1:,}"
            for t in self
            if t.is_on(step) != t.is_on(step - 1)
        ]

    def remedies(self, step: int) -> tuple[str, ...]:
        """Return what the transforms suggest if the loss went wrong in step `step` (from 0)."""
        return tuple(filter(None, (t.remedy(step) for t in self)))

    def evaluated_as(self) -> str:
        """Return how held-out rows are evaluated; empty if just as the model is trained."""
        return ", ".join(t.evaluated_as for t in self if t.evaluated_as)

    def twins(self) -> Iterator[JobConfig]:
        """Yield the jobs without one of the features that are trained before this one, to measure
        the feature by; each has its own output_dir.

        A twin that is complete is not trained again; one that was interrupted resumes.
        """
        output = self.job.output
        for folder, twin in filter(None, (t.twin(self.job) for t in self)):
            keys = {
                "output_dir": folder,
                "resume_from_checkpoint": None if output.overwrite_output_dir else True,
                "compare_with": None,
                "export_model": True,  # what this run will be measured by
                "num_sample_answers": 0,
            }
            yield replace(twin, output=output.model_copy(update=keys))

    def _stages(self, plans: Mapping[str, Plan]) -> list[tuple[str, Plan]]:
        """Return the plans so far with their transforms' stages."""
        return [(t.stage, plans[t.name]) for t in self if t.name in plans]


def _require_import(transform: Transform, package: str, facts: HardwareFacts) -> None:
    try:
        importlib.import_module(package)
    except (ImportError, OSError) as error:
        version = facts.versions.get(package.replace("_", "-")) or "of unknown version"
        key = switch(transform)
        raise ClusterError(
            f"{type(transform).feature} needs {package}: {package} not available",
            f"node {facts.node_ip}, {package} {version} cannot be imported: {error}",
            f"reinstall it on that node, with the versions of constraints.txt, or set "
            f"{key}: {show(type(transform).default(key))}",
        ) from error


def _after_the_machine(error: JobError, transform: Transform, machine: HardwareFacts) -> JobError:
    """Return a plan's error after that of the machine, if it refuses too."""
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
    """Return one error with the texts of several."""
    if len(errors) == 1:
        return errors[0]
    return JobError(
        f"{len(errors)} features cannot be enabled as configured",
        "\n".join(f"{error.what}: {error.found}" for error in errors),
        "\n".join(dict.fromkeys(error.fix for error in errors)),
    )
