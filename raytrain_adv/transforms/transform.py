"""The base class of all features that change a model: YAML keys, rules, a plan, and the changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from raytrain_adv.config.section import Section
from raytrain_adv.errors import ClusterError
from raytrain_adv.transforms.modules import class_name

if TYPE_CHECKING:
    import torch
    from torch import nn

    from raytrain_adv.config.job import JobConfig
    from raytrain_adv.hardware import HardwareFacts
    from raytrain_adv.ops.noise import Segments

STAGES = ("adapter", "precision", "kernel", "loss")
DEFECT = (
    "this is a defect of raytrain_adv or of the versions installed: compare them with "
    "constraints.txt"
)
"""What to do if a comparison of this package's own fails."""


@dataclass(frozen=True)
class Change:
    """What one module becomes: its class before and after, as Transform.what_is returns it; for a
    forward pass that `install` replaces, the class and the name of what computes it instead."""

    before: str
    after: str
    part: Literal["class", "forward"] = "class"
    """Changed: the module's class, in `prepare`, or its forward pass alone, in `install`."""
    proven_by: str = ""
    """Operator that must run for it, if not the transform's."""


@dataclass(frozen=True)
class Plan:
    """What a transform will do to a model, by fully qualified module name (fqn)."""

    transform: str
    changes: Mapping[str, Change] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    """fqn -> why the module is left unchanged."""
    notes: tuple[str, ...] = ()
    """Sentences for the plan and the report: advice, costs, what to expect."""
    empty_because: str = ""
    """Why a plan without changes is right; a plan without changes or reason is refused."""
    gives_way_to: frozenset[str] = frozenset()
    """Earlier transforms that keep the modules which both would change."""
    details: Mapping[str, Any] = field(default_factory=dict)  # more for report.json, as JSON types

    def with_notes(self, *notes: str) -> Plan:
        """Return the plan with these notes after its own."""
        return replace(self, notes=self.notes + notes)


@dataclass(frozen=True)
class Context:
    """What a plan depends on besides the model and the transform's own keys."""

    job: JobConfig
    facts: HardwareFacts  # a machine the job will run on
    num_tokens: int | None = None  # tokens of one worker's forward pass, if known


@dataclass(frozen=True)
class Worker:
    """Where and how a worker computes the resolved job."""

    job: JobConfig
    device: torch.device
    dtype: torch.dtype  # that of matrix products and activations


@dataclass(frozen=True)
class Gathering:
    """How a feature changes what FSDP2 gathers."""

    sizes: Mapping[nn.Parameter, int] = field(default_factory=dict)
    """Parameters gathered in another dtype than they compute in -> bytes of one number."""
    less_with: str = ""
    """The key and value with which fewer bytes would be gathered; empty if there is none."""


class Transform(Section):
    """One feature: the fields are its YAML keys, the methods its rules and changes, in the order in
    which a run calls them; each may be left out. It is found by its file in this package, which
    must be importable without torch. One that can be off in a step derives from Switchable.
    """

    name: ClassVar[str]
    stage: ClassVar[str]
    """One of STAGES; transforms are applied in that order."""
    imports: ClassVar[tuple[str, ...]] = ()
    """Packages that workers import for it."""
    stacks_on: ClassVar[frozenset[str]] = frozenset()
    """Names or stages of transforms whose modules this one may change again."""
    proven_by: ClassVar[str] = ""
    """Operator that must run in a training step at least once per changed module, as
    aten::_scaled_mm; empty if the modules' classes are proof enough."""
    covers: ClassVar[Literal["", "weights", "flops"]] = ""
    """Of what a plan should change the larger part: of the weights, or of the FLOPs of the matrices
    that a token passes; empty for features that do neither."""
    speed: ClassVar[float] = 1.0
    """Measured speed of a step, relative to the same step without the feature."""
    titles: ClassVar[Mapping[str, str]] = {}
    """Value of the first key -> what a text calls the feature then."""

    @property
    def enabled(self) -> bool:
        """Whether the feature is on: its first key is neither false, null nor 0."""
        return bool(getattr(self, next(iter(type(self).model_fields))))

    def check(self, facts: HardwareFacts) -> None:
        """Refuse a machine or software that cannot do what the keys enable. Raises ClusterError
        naming the rule that refused, what was found, and what to do.
        """

    def fetch(self, job: JobConfig, facts: HardwareFacts, say: Callable[[str], None]) -> None:
        """Put what the workers need into output_dir. Called on the driver before anything is
        planned, and on rank 0 before the model is built, where all is there already. `say` prints a
        sentence for the user.
        """

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Return what would change, and change nothing. The model may be on the meta device. Raises
        JobError when the keys name modules that the model does not have.
        """
        return Plan(self.name)

    def prepare(self, model: nn.Module, plan: Plan) -> None:
        """Change the model in place, exactly as planned; before it is compiled and sharded."""

    def what_is(self, module: nn.Module) -> str:
        """Return a module's class, and what else the transform changes and is verified by."""
        return class_name(module)

    def install(self, model: nn.Module, plan: Plan, worker: Worker) -> Plan:
        """Replace the planned forward passes, and try what was changed; return the plan with what
        was found. Called on workers only, between `prepare` and compiling and sharding; the model
        is on the meta device. Raises JobError when a replacement is wrong; TrainingError when a
        changed module computes something else than it should.
        """
        return plan

    def before_sharding(self, model: nn.Module) -> None:
        """Change how FSDP2 will shard and gather; called only if the model will be sharded."""

    def gathering(self, model: nn.Module) -> Gathering:
        """Return how `before_sharding` changes what FSDP2 gathers, to predict the traffic."""
        return Gathering()

    def initialize(self, model: nn.Module, plan: Plan, seed: int) -> tuple[str, ...]:
        """Initialize the parameters that `prepare` added, and compare changed weights with those
        that were read; return notes. Called on all ranks once weights are loaded and sharded.
        Raises TrainingError on all ranks, when weights differ from those that were read.
        """
        return ()

    def is_on(self, step: int) -> bool:
        """Whether the feature is on in optimizer step `step` (from 0)."""
        return True

    def begin_batch(self, model: nn.Module, step: int, first: int, segments: Segments) -> None:
        """Prepare for a micro-batch's forward pass in optimizer step `step` (from 0). `first` is
        the place of its first sequence among all of the step, over all workers.
        """

    def after_step(self, model: nn.Module) -> None:
        """Follow up on new parameter values: after each optimizer step and after each load."""


class Switchable(Transform):
    """A feature that a model with it can compute without: for the steps of training before it
    begins, and to measure what it changes. Held-out rows are evaluated with it on.
    """

    evaluated_as: ClassVar[str]
    """How held-out rows are evaluated."""

    def switch(self, model: nn.Module, on: bool) -> None:
        """Turn the feature on or off: before each step as `is_on` returns."""
        raise NotImplementedError

    def remedy(self, step: int) -> str:
        """Return which keys to change if the loss rises or is not finite in this optimizer step
        (from 0); empty if the feature cannot be the cause.
        """
        return ""

    def variants(self, step: int, total_steps: int, of: str = "") -> dict[str, bool]:
        """Return what else to evaluate after `step` optimizer steps: the name of each variant, and
        whether the feature is on in it. `of` names whose weights the model has, if not this run's:
        a twin's that was trained without the feature.
        """
        return {}

    def twin(self) -> tuple[str, frozenset[str]] | None:
        """Return the run to train first, to measure the feature by: what is added to output_dir's
        name for it, and the names of the transforms it leaves out; None unless the keys request it.
        """
        return None


def require_package(
    facts: HardwareFacts, what: str, package: str, off: str, install: str = ""
) -> None:
    """Refuse a node without the package that `what` needs. `off` is how to run without it,
    `install` the requirement to install, by default the package's name. Raises ClusterError naming
    the node and the package.
    """
    if facts.versions.get(package) is None:
        raise ClusterError(
            f"{what} needs {package}: {package} not available",
            f"node {facts.node_ip}, {package} is not installed",
            f"pip install '{install or package}' on that node, or {off}",
        )


def title_of(transform: Transform) -> str:
    """Return what a text calls a feature, with these keys."""
    value = getattr(transform, next(iter(type(transform).model_fields)), "")
    return transform.titles.get(str(value), transform.feature or transform.name)


def require_gpu(facts: HardwareFacts, what: str, off: str) -> None:
    """Refuse a node without a GPU; `what` is the rule, and `off` how to run without one. Raises
    ClusterError describing the node.
    """
    if facts.device_type != "cuda":
        raise ClusterError(what, facts.describe(), f"run on GPU workers, or {off}")


def require_hopper(facts: HardwareFacts, cpu: tuple[str, bool], off: str) -> None:
    """Refuse a node without FP8 products; `cpu` is the key that allows a CPU, and whether it does,
    `off` is how to run without FP8. Raises ClusterError describing the node.
    """
    key, allows = cpu
    if facts.device_type == "cpu" and allows:
        return
    if facts.compute_capability is None or facts.compute_capability < (9, 0):
        fix = f"run on H100/H200 workers, or {off}"
        if facts.device_type == "cpu":
            fix += f"; {key}: true allows it on a CPU, exact but slow"
        what = "FP8 requires Hopper architecture (compute capability 9.0 or newer)"
        raise ClusterError(what, facts.describe(), fix)
