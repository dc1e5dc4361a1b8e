"""The shape all transforms share: YAML keys, rules, a plan, the changes, and the proof that they
happened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from raytrain_adv.config.section import Section
from raytrain_adv.transforms.modules import class_name

if TYPE_CHECKING:
    import torch
    from torch import nn

    from raytrain_adv.config.job import JobConfig
    from raytrain_adv.hardware import HardwareFacts

STAGES = ("adapter", "precision", "kernel", "loss")


@dataclass(frozen=True)
class Change:
    """What one module becomes: its class before and after, as Transform.what_is has it; of a
    forward pass that `install` replaces, the class it was and the name of what computes it now.
    """

    before: str
    after: str
    part: Literal["class", "forward"] = "class"
    """What is changed: the module's class, in `prepare`, or its forward pass alone, in `install`.
    """


@dataclass(frozen=True)
class Plan:
    """What a transform will do to a model, by fully qualified module name (fqn)."""

    transform: str
    changes: Mapping[str, Change] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    """fqn -> why the module is left as it is."""
    notes: tuple[str, ...] = ()
    """Sentences for the plan and the report: advice, costs, what to expect."""
    empty_because: str = ""
    """Why a plan without changes is what was asked for; a plan that does not say so is refused."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """More for report.json, as JSON types."""


class Transform(Section):
    """One feature: the fields are its YAML keys, the methods its rules and changes. Every method
    may be left out.

    A transform is found by its file in raytrain_adv/transforms; it must be importable without
    torch.
    """

    name: ClassVar[str]
    stage: ClassVar[str]
    """One of STAGES; transforms are applied in that order."""
    imports: ClassVar[tuple[str, ...]] = ()
    """Packages that workers import for it."""
    proven_by: ClassVar[str] = ""
    """Operator that must run in a training step, at least once per changed module, as
    aten::_scaled_mm; none where the modules' classes are proof enough.
    """
    evaluated_as: ClassVar[str] = ""
    """Where the feature can be switched off in training: what held-out rows are evaluated as, which
    always have it on; for console and report.
    """
    switches: ClassVar[str] = ""
    """What is switched where is_on changes, for console and events; empty stands for the name."""
    stacks_on: ClassVar[frozenset[str]] = frozenset()
    """Names of transforms whose modules this one may change again."""

    @property
    def gives_way_to(self) -> frozenset[str]:
        """Names of transforms to which this one leaves modules that both would change."""
        return frozenset()

    @property
    def enabled(self) -> bool:
        """Whether the job asks for this transform; a pure function of its own keys."""
        return False

    def check(self, facts: HardwareFacts) -> None:
        """Raise if this machine or this software cannot do what the keys ask for.

        Raises:
            ClusterError: naming the rule that refused, what was found, and what to do.
        """

    def plan(self, model: nn.Module) -> Plan:
        """Say, module by module, what would change; change nothing. The model may be on the meta
        device.

        Raises:
            JobError: when the keys name modules that the model does not have.
        """
        return Plan(self.name)

    def fetch(self, job: JobConfig, facts: HardwareFacts, say: Callable[[str], None]) -> None:
        """Bring what the workers need into output_dir. Called on the driver before anything is
        planned, and on rank 0 before the model is built: the second time it finds all there.

        Args:
            job: the resolved job.
            facts: a machine the job will run on.
            say: tells the user a sentence.
        """

    def plan_for(self, job: JobConfig, model: nn.Module, facts: HardwareFacts) -> Plan:
        """Plan with what other keys of the job and the machine decide; most need only the model."""
        return self.plan(model)

    def advice(self, job: JobConfig, num_tokens: int) -> tuple[str, ...]:
        """Say what the job's other keys mean for this feature, for the plan and the report.

        Args:
            job: the resolved job.
            num_tokens: tokens of one worker's forward pass.
        """
        return ()

    def prepare(self, model: nn.Module, plan: Plan, facts: HardwareFacts) -> None:
        """Change the model in place, exactly as planned; before it is compiled and sharded."""

    def what_is(self, module: nn.Module) -> str:
        """Return what a module is, in the words of the plan's changes: its class. A transform that
        changes more than classes says more, and is verified by it.
        """
        return class_name(module)

    def probe(
        self, model: nn.Module, plan: Plan, device: torch.device, dtype: torch.dtype
    ) -> tuple[str, ...]:
        """Try what was changed on the worker's device, before weights are loaded; return sentences
        for the report.

        Raises:
            TrainingError: when a changed module does not do what it stands for.
        """
        return ()

    def install(
        self, model: nn.Module, plan: Plan, job: JobConfig, device: torch.device, dtype: torch.dtype
    ) -> Plan:
        """Replace the forward passes that were planned, after trying the new ones out; on workers
        alone, after `prepare` and before the model is compiled and sharded.

        Args:
            model: on the meta device.
            plan: what was planned.
            job: the resolved job.
            device: where this worker computes.
            dtype: that of matrix products and activations.

        Returns:
            The plan, with what was found.
        """
        return plan

    def before_sharding(self, model: nn.Module) -> None:
        """Change how FSDP2 will shard and gather; called only where it will be applied."""

    def initialize(self, model: nn.Module, seed: int) -> None:
        """Give values to the parameters that prepare added, after the model's own weights are
        loaded and sharded.
        """

    def loaded(self, model: nn.Module, plan: Plan) -> tuple[str, ...]:
        """Hold weights that were changed as they were read to what they stand for; return sentences
        for the report. Called on all ranks once, before training.

        Raises:
            TrainingError: on all ranks, when they do not stand for it.
        """
        return ()

    def begin_step(self, model: nn.Module, step: int) -> None:
        """Bring the model into its state for optimizer step `step` (from 0); a pure function of the
        step.
        """

    def begin_batch(
        self, model: nn.Module, step: int, first: int, segments: tuple[tuple[int, ...], ...]
    ) -> None:
        """Take note of what the next forward pass of optimizer step `step` (from 0) is given.

        Args:
            model: the model.
            step: optimizer step.
            first: place of the batch's first sequence among all of the step, over all workers.
            segments: of each sequence the tokens of the conversations in it; padding follows.
        """

    def is_on(self, step: int) -> bool:
        """Whether the feature is on in optimizer step `step` (from 0)."""
        return True

    def switched(self, step: int) -> str:
        """Return what to say where is_on changes with optimizer step `step` (from 0)."""
        what = self.switches or self.name
        return f"{what} is {'on' if self.is_on(step) else 'off'} from step {step + 1:,}"

    def remedy(self, step: int) -> str:
        """Return what of these keys to try where the loss rises or is not finite in optimizer step
        `step` (from 0); empty where the feature is not suspect.
        """
        return ""

    def switch(self, model: nn.Module, on: bool) -> None:
        """Turn the feature on or off, where that can be; held-out rows are evaluated with it on."""

    def variants(self, step: int, total_steps: int, of: str = "") -> dict[str, bool]:
        """Return what to evaluate after `step` steps beside the run itself: the name of each
        variant, and whether the feature is on in it.

        Args:
            step: optimizer steps that were done.
            total_steps: of the run.
            of: whose weights the model has, if not this run's: a twin's that was trained without
                the feature.
        """
        return {}

    def twin_dir(self, output_dir: str) -> str | None:
        """Return the output_dir of the same job without this feature that is trained first, where
        the keys ask for one.
        """
        return None

    def without(self) -> Transform:
        """Return these keys with the feature turned off."""
        return type(self)()

    def after_step(self, model: nn.Module) -> None:
        """Follow up on new parameter values: after each optimizer step and after each load."""

    def convert(self, model: nn.Module) -> nn.Module:
        """Return the deployable form of a gathered, unsharded model."""
        return model
