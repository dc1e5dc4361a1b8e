"""Replace modules' forward passes by kernels from the Hub or from folders."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from raytrain_adv.config.problems import Problem, show
from raytrain_adv.config.section import PathText, Text
from raytrain_adv.errors import ClusterError, JobError
from raytrain_adv.kernels import fetch, lock, source
from raytrain_adv.kernels.fetch import Build, NoBuild, Place
from raytrain_adv.kernels.source import KernelEntry, Wanted
from raytrain_adv.kernels.variants import Target, is_build, numbers
from raytrain_adv.kernels.variants import choose as choose_build
from raytrain_adv.text import plural
from raytrain_adv.transforms.modules import class_name
from raytrain_adv.transforms.transform import Change, Context, Plan, Transform, Worker

if TYPE_CHECKING:
    from torch import nn

    from raytrain_adv.config.job import JobConfig
    from raytrain_adv.hardware import HardwareFacts
    from raytrain_adv.kernels.select import Choice

DEFAULT = Wanted(
    "kernels-community/liger-kernels",
    is_local=False,
    version=3,
    layers={"RMSNorm": "LigerRMSNorm"},
)
"""What use_kernels: true means alone. Source: transformers 5.23's own mapping of kernels, in which
it is the one layer of a dense model that is meant for training."""
OF_DEFAULT = (
    "use_kernels: true without kernel_name: LigerRMSNorm, whose gradient is known to be correct; "
    "nothing else of the Hub's own choice trains"
)
OLDEST = (0, 16)  # version of the kernels package that has the modes used here


class HubKernels(Transform):
    """Compute modules by kernels: forward passes are swapped, modules and weights stay."""

    name: ClassVar[str] = "kernels"
    feature: ClassVar[str] = "HF Kernels"
    also_called: ClassVar[tuple[str, ...]] = ("hub kernels",)
    tried_with: ClassVar[dict[str, Any]] = dict(
        use_kernels=True, kernel_name="jobs/kernels/llama_layers"
    )
    stage: ClassVar[str] = "kernel"
    # What these put inside an MLP is still called: a trial on the worker checks that.
    stacks_on: ClassVar[frozenset[str]] = frozenset({"adapter", "precision"})

    use_kernels: bool = False
    """Compute modules by kernels; without kernel_name by those known to train this model
    correctly."""
    kernel_name: (
        Text | KernelEntry | Annotated[list[Text | KernelEntry], Field(min_length=1)] | None
    ) = None
    """Kernels on the Hub or in folders: a name as kernels-community/activation@v1, a path, an entry
    {repo, revision or version, layers} or {path, layers}, or a list of these."""
    kernels_lock: PathText | None = None
    """Lock file made by `raytrain-adv kernels lock`: kernels that are not in it, or differ from it,
    are refused, that of flash_attn too."""
    kernels_trust: list[Text] = []  # noqa: RUF012  # pydantic copies it
    """Publishers on the Hub whose code may run on the workers, besides those the Hub marks as
    trusted."""

    def serves(self, key: str, job: JobConfig) -> bool:
        """Whether attention's kernel uses a key: the lock file and trust apply to it too."""
        return key in ("kernels_lock", "kernels_trust") and job.model.flash_attn.startswith("hub:")

    def without_effect(self, job: JobConfig) -> Iterable[str]:
        """Return a sentence if publishers are trusted but every kernel comes from a folder."""
        attention = job.model.flash_attn
        is_folder = attention.startswith(("hub:/", "hub:.", "hub:~"))
        of_attention = attention.startswith("hub:") and not is_folder
        are_local = bool(self.wanted) and all(one.is_local for one in self.wanted)
        of_modules = self.enabled and not are_local  # without kernel_name it is one of the Hub's
        if self.is_changed("kernels_trust") and not of_attention and not of_modules:
            trust = show(self.kernels_trust)
            yield f"kernels_trust: {trust} has no effect: no kernel of the Hub is used"

    @property
    def wanted(self) -> tuple[Wanted, ...]:
        """The kernels in kernel_name."""
        return source.read(self.kernel_name)

    @classmethod
    def why_not(cls, key: str, value: object) -> str:
        """Return which key of which entry is wrong."""
        return source.why_not(value) if key == "kernel_name" else ""

    def contradictions(self) -> Iterable[Problem]:
        """Refuse entries that name no kernel."""
        yield from source.problems(self.kernel_name)
        if self.kernels_lock is not None:
            yield from source.path_problems(self.kernels_lock, "kernels_lock")

    def check(self, facts: HardwareFacts) -> None:
        """Refuse machines without the kernels package."""
        version = facts.versions.get("kernels")
        if version is None or numbers(version) < OLDEST:
            missing = ": kernels package not available" if version is None else ""
            raise ClusterError(
                f"use_kernels needs the package kernels, {OLDEST[0]}.{OLDEST[1]} or newer{missing}",
                f"node {facts.node_ip}, kernels {version or 'is not installed'}",
                "pip install 'raytrain-adv[advanced]' on that node, or set use_kernels: false",
            )

    def fetch(self, job: JobConfig, facts: HardwareFacts, say: Callable[[str], None]) -> None:
        """Put the kernels' files into output_dir, pinned by kernels.lock.json there; files of an
        earlier attempt stay.
        """
        if wanted := self._wanted_on(job, facts):
            fetch.fetch(wanted, self.place(job, facts), own_lock(job), say)

    def place(self, job: JobConfig, facts: HardwareFacts) -> Place:
        """Return where the job's kernels are searched."""
        return Place(
            target=Target.of(facts),
            given=Path(self.kernels_lock) if self.kernels_lock is not None else None,
            own=own_lock(job),
            trust=tuple(self.kernels_trust),
        )

    def _wanted_on(self, job: JobConfig, facts: HardwareFacts) -> tuple[Wanted, ...]:
        if self.wanted:
            return self.wanted
        return () if no_default(job, facts) else (DEFAULT,)

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Choose the kernel's layer for each module that gets one."""
        from raytrain_adv.kernels.select import all_sites, choose

        job, facts = context.job, context.facts
        why = "" if self.wanted else no_default(job, facts)
        if not self.wanted and not why and not all_sites(model).get("RMSNorm"):
            why = "use_kernels: true replaces nothing here: the model has no RMSNorm it knows"
        if why:
            return Plan(self.name, notes=(why,), empty_because=why)
        builds = [self._planned(one, job, facts) for one in self._wanted_on(job, facts)]
        chosen = choose(model, builds, compiled=job.parallel.torch_compile)
        changes = {
            fqn: Change(class_name(model.get_submodule(fqn)), one.name, part="forward")
            for fqn, one in chosen.layers.items()
        }
        notes = [] if self.wanted else [OF_DEFAULT]
        notes += [*map(_origin, builds), *chosen.notes, *_costs(job, chosen)]
        notes += [note for build in builds for note in _reservations(build, job, facts)]
        details = {"kernels": [b.locked.model_dump(exclude={"folder"}) for b in builds]}
        return Plan(self.name, changes, chosen.skipped, tuple(notes), details=details)

    def _planned(self, wanted: Wanted, job: JobConfig, facts: HardwareFacts) -> Build:
        """Return a kernel's build; any of them if the plan is made on a machine without the job's
        GPU, where `fetch` refuses a run.
        """
        place = self.place(job, facts)
        try:
            return fetch.find(wanted, place)
        except NoBuild:
            if job.parallel.use_cpu or facts.device_type != "cpu":
                raise
            return fetch.find(wanted, replace(place, target=None))

    def install(self, model: nn.Module, plan: Plan, worker: Worker) -> Plan:
        """Test each kernel on this device and dtype, and put it in its places."""
        from raytrain_adv import hardware
        from raytrain_adv.kernels.select import choose
        from raytrain_adv.kernels.swap import install

        if not plan.changes:
            return plan
        job, device = worker.job, worker.device
        facts = hardware.detect(device)
        builds = [fetch.find(one, self.place(job, facts)) for one in self._wanted_on(job, facts)]
        for build in builds:
            lock.require_same(build.locked, build.folder, own_lock(job))
        chosen = choose(model, builds, compiled=job.parallel.torch_compile)
        planned = {fqn: change.after for fqn, change in plan.changes.items()}
        if {fqn: one.name for fqn, one in chosen.layers.items()} != planned:
            fix = "run the job again, while nothing else writes into output_dir"
            what = "the kernels changed between the plan and the run"
            raise JobError(what, str(own_lock(job)), fix)
        trials = install(model, chosen, device, worker.dtype, job.parallel.torch_compile)
        details = {**plan.details, "trials": [asdict(trial) for trial in trials]}
        return replace(plan, details=details).with_notes(*(trial.sentence for trial in trials))


def own_lock(job: JobConfig) -> Path:
    """Return the lock file of a run."""
    return Path(job.output.output_dir) / lock.FILE_NAME


def no_default(job: JobConfig, facts: HardwareFacts) -> str:
    """Return why use_kernels: true alone replaces nothing; empty if it replaces something."""
    where, why = "", ""
    if job.parallel.torch_compile:
        where, why = "under torch_compile", "cannot be compiled, and PyTorch fuses the norm itself"
    elif facts.device_type != "cuda":
        where, why = "on a CPU", "is a Triton kernel and needs a GPU"
    text = f"use_kernels: true replaces nothing {where}: its default, LigerRMSNorm, {why}"
    return text if where else ""


def _origin(build: Build) -> str:
    locked = build.locked
    pinned = f"commit {locked.commit}" if locked.commit else f"sha256 {locked.digest[:12]}"
    of = f"build {locked.variant}, {plural(len(locked.files), 'file')}"
    return f"{build.wanted.asked}: {pinned}, {of}; {locked.trust}"


def _reservations(build: Build, job: JobConfig, facts: HardwareFacts) -> Iterable[str]:
    target = Target.of(facts)
    if is_build(build.locked.variant) and choose_build([build.locked.variant], target) is None:
        yield f"{build.name} has no build for {target}: a run here would be refused"
    if build.wanted.is_local and build.folder.is_relative_to(own_lock(job).parent):
        origin = fetch.local_build(build.wanted, target)
        if origin is not None and lock.differences(build.locked, origin):
            kept = "the run keeps using its copy in output_dir"
            yield f"{build.wanted.source} has changed since this run began; {kept}"


def _costs(job: JobConfig, chosen: Choice) -> Iterable[str]:
    bridged = sorted({one.name for one in chosen.layers.values() if one.is_bridged})
    if bridged:
        only = "the kernel computes forward only; its gradient is raytrain_adv's"
        yield f"{', '.join(bridged)}: {only}"
    if job.parallel.torch_compile:
        yield (
            "torch_compile fuses what it compiles with its neighbors, and cannot do that with "
            "a kernel: the step may be slower than with use_kernels: false; compare the two"
        )
