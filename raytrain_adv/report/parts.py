"""The types of report.json: numbers, and the records inside it."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, JsonValue
from pydantic_core import to_jsonable_python

from raytrain_adv.documented import Documented
from raytrain_adv.redaction import redact, redact_arguments
from raytrain_adv.transforms.transform import Plan


def _json(value: Any) -> Any:
    """Return the value as JSON has it: objects, lists, scalars, also of numpy and torch; NaN and
    infinity become null.
    """
    return to_jsonable_python(value, inf_nan_mode="null", fallback=lambda other: other.tolist())


Number = Annotated[float | None, BeforeValidator(_json)]
JsonObject = Annotated[dict[str, JsonValue], BeforeValidator(_json)]
JobObject = Annotated[dict[str, JsonValue], BeforeValidator(lambda job: _json(redact(job)))]
Arguments = Annotated[str, BeforeValidator(redact_arguments)]
Seconds = Annotated[float, BeforeValidator(_json)]
Point = tuple[int, Number]


class Record(Documented, BaseModel):
    """A frozen part of the report. The string under a field is its documentation."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(),
        allow_inf_nan=False,
    )  # fmt: skip


class Failure(Record):
    """The error of a failed run, in its parts."""

    kind: str
    """The error's class, as JobError or OutOfMemoryError."""
    what: str
    """What happened, one sentence."""
    found: str = ""
    """What was found; may have several lines."""
    fix: str = ""
    """What can be done; may have several lines."""
    exit_code: int
    """Exit code of the launch command: 2 the job file, 3 training failed, 4 the cluster refused,
    130 stopped by Ctrl-C or SIGTERM.
    """
    rank: int | None = None
    """The worker on which it happened; null means the driver."""
    trace: str = ""
    """Last lines of the traceback, unless the error is one of this package's."""


class TransformReport(Record):
    """What one transform did to the model."""

    changed: int
    """Modules that were changed, verified on the model."""
    skipped: int
    """Modules that could have been changed and were left as they are."""
    changed_by_class: dict[str, int] = {}
    """Number of changed modules by class, as {"Linear -> Float8Linear": 224}."""
    changed_modules: tuple[str, ...] = ()
    """Names of the changed modules, numbered ones folded, as model.layers.[0-31].mlp.up_proj."""
    skipped_reasons: dict[str, int] = {}
    """Number of skipped modules by reason."""
    skipped_modules: dict[str, tuple[str, ...]] = {}
    """Names of the skipped modules by reason, numbered ones folded."""
    notes: tuple[str, ...] = ()
    """Sentences of advice, cost and what to expect."""
    details: JsonObject = {}
    """More facts; for kernels: source, commit, build and sha256 of each file, and each layer's
    relative error in the trial.
    """
    proof: JsonObject = {}
    """A profile of one training step: the operator, how often it ran, its GPU kernels, and the same
    of others; empty if the modules' classes are proof enough.
    """

    @property
    def proof_sentence(self) -> str:
        """The proof in words; empty if there is none."""
        sentence = "{operator} ran {calls} times in one training step, for {modules} modules"
        others: Any = self.proof.get("others", [])
        proofs = [self.proof, *others] if self.proof else []
        return "; ".join(sentence.format(**proof) for proof in proofs)

    @classmethod
    def of(cls, plan: Plan, proof: Mapping[str, Any] | None = None) -> "TransformReport":
        """Return the report of a plan that was applied and verified."""
        classes = Counter(f"{change.before} -> {change.after}" for change in plan.changes.values())
        reasons: dict[str, list[str]] = {}
        for fqn, reason in plan.skipped.items():
            reasons.setdefault(reason, []).append(fqn)
        return cls(
            changed=len(plan.changes),
            skipped=len(plan.skipped),
            changed_by_class=dict(classes),
            changed_modules=fold_names(plan.changes),
            skipped_reasons={reason: len(fqns) for reason, fqns in reasons.items()},
            skipped_modules={reason: fold_names(fqns) for reason, fqns in reasons.items()},
            notes=plan.notes,
            details=dict(plan.details),
            proof=dict(proof or {}),
        )


class Sample(Record):
    """A held-out prompt, and the trained model's answer."""

    prompt: str
    """The prompt as the model saw it, or its last message."""
    answer: str
    """The trained model's answer."""
    reference: str | None = None
    """The dataset's answer."""
    cut: str = ""
    """What cut the answer before it ended by itself; empty if nothing did."""

    @property
    def shown(self) -> str:
        """The answer, marked if it was cut."""
        return f"{self.answer.strip()} [cut: {self.cut}]".lstrip() if self.cut else self.answer


class NodeReport(Record):
    """A node of the cluster before anything was scheduled."""

    address: str
    """Address of the node, or the autoscaler's group of nodes that may start."""
    node_id: str = ""
    """Ray's id of the node; empty if it has not started."""
    used: bool
    """Whether workers were allowed on it."""
    workers: int
    """Workers that fit on it."""
    reason: str = ""
    """The rule that excludes it; empty if none does."""
    found: str = ""
    """What was found there that breaks the rule."""
    gpus: tuple[str, ...] = ()
    """Name of each GPU, or of each MIG slice."""
    compute_capability: str | None = None
    """Lowest compute capability of its GPUs, as 9.0; null without a GPU."""
    memory_gib: Number = None
    """Memory of its smallest GPU."""
    free_memory_gib: Number = None
    """Free memory of the GPU with the least."""
    driver_version: str | None = None
    """NVIDIA driver."""
    cuda_version: str | None = None
    """CUDA version PyTorch was built for there."""
    versions: dict[str, str | None] = {}
    """Version of each package there; null if it is not installed."""


class PreflightReport(Record):
    """The cluster's nodes before anything was scheduled."""

    nodes: tuple[NodeReport, ...]
    """Every live node, and the groups that an autoscaler may start."""
    warnings: tuple[str, ...] = ()
    """Findings that did not stop the run."""
    seconds: Number = None
    """Time until every node answered."""


class Upload(Record):
    """A folder that push_to_hub uploads."""

    folder: str
    """The exported folder."""
    repository: str
    """Its repository on the Hub, as owner/name."""
    url: str = ""
    """Address of the commit; empty if the upload failed."""
    error: str = ""
    """Why the upload failed, after it was repeated; empty if it did not."""


class Baseline(Record):
    """The run named by compare_with, and this run compared with it."""

    output_dir: str
    """Its output_dir."""
    changed_keys: tuple[str, ...] = ()
    """The keys that change what is computed and differ, as `lora_rank: 8 then, 16 now`."""
    train_loss: tuple[Point, ...] = ()
    """Its training loss as [step, value]."""
    eval_loss: tuple[Point, ...] = ()
    """Its loss on the held-out rows as [step, value]."""
    final_eval_loss_change: Number = None
    """This run's last eval loss over its last one, less 1: 0.004 means 0.4 % higher; null unless
    both end at the same step.
    """
    speedup: Number = None
    """This run's tokens per second per worker over its."""
    memory_ratio: Number = None
    """This run's peak memory over its."""


class Start(Record):
    """A start of the workers."""

    step: int
    """Optimizer steps that were finished before it."""
    time: Number = None
    """When it began, in unix seconds."""
    workers: int
    """Number of workers."""
    nodes: tuple[str, ...] = ()
    """Address of each of their nodes."""
    lost: tuple[str, ...] = ()
    """Nodes of the previous start that were lost."""


class Variant(Record):
    """The held-out rows evaluated with a feature on or off."""

    name: str
    """bf16: not rounded; PTQ: rounded without training for it; and with such training. Those of
    the twin were trained without it throughout.
    """
    step: int
    """Optimizer steps after which it was evaluated."""
    loss: Number = None
    """Mean loss per label token."""
    perplexity: Number = None
    """Its exponential."""
    exact_answers: Number = None
    """Share of the held-out answers that greedy decoding gives exactly, with compute_accuracy."""


def fold_names(fqns: Iterable[str]) -> tuple[str, ...]:
    """Fold names that differ in their numbers only: a.0.b, a.1.b become a.[0-1].b."""
    groups: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for fqn in fqns:
        parts = re.split(r"(?<=\.)(\d+)(?=\.|$)", fqn)
        groups.setdefault(tuple(parts[::2]), []).append(tuple(int(n) for n in parts[1::2]))
    return tuple(name for texts, numbers in groups.items() for name in _folded(texts, numbers))


def _folded(texts: tuple[str, ...], numbers: Sequence[tuple[int, ...]]) -> list[str]:
    """Return one name if the numbers are a full grid (each layer x each expert), else the names."""
    axes = [sorted(set(axis)) for axis in zip(*numbers, strict=True)]
    rows = [[str(n) for n in row] for row in numbers]
    if math.prod(map(len, axes)) == len(set(numbers)):
        rows = [[_span(axis) for axis in axes]]
    return ["".join(map("".join, zip(texts, [*row, ""], strict=True))) for row in rows]


def _span(values: list[int]) -> str:
    """Return sorted integers as 7, or as [0-3,8]."""
    if len(values) == 1:
        return str(values[0])
    # Numbers of one run are as far from their places in the list.
    grouped = groupby(enumerate(values), key=lambda place: place[1] - place[0])
    runs = [[value for _, value in run] for _, run in grouped]
    return "[" + ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs) + "]"
