"""report.json: what a run was asked for, did and reached; a contract that scripts read."""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, JsonValue, ValidationError

from raytrain_adv.errors import RaytrainAdvError, StorageError
from raytrain_adv.transforms.transform import Plan
from raytrain_adv.worker.redact import redact, redact_arguments

FILE_NAME = "report.json"


def _json(value: Any) -> Any:
    """Return the value as JSON has it: objects, lists, scalars; NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {str(key): _json(inner) for key, inner in value.items()}
    if isinstance(value, str | bytes | Path):
        return value if isinstance(value, str) else os.fsdecode(value)
    item = getattr(value, "item", None)  # numpy and torch scalars, none of which is imported here
    if callable(item) and getattr(value, "ndim", 0) == 0:
        value = item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Iterable):
        return [_json(inner) for inner in value]
    return value


Number = Annotated[float | None, BeforeValidator(_json)]
JsonObject = Annotated[dict[str, JsonValue], BeforeValidator(_json)]
JobObject = Annotated[dict[str, JsonValue], BeforeValidator(lambda job: _json(redact(job)))]
Arguments = Annotated[str, BeforeValidator(redact_arguments)]
Point = tuple[int, Number]


class Record(BaseModel):
    """A frozen part of the report. The string under a field is its documentation."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


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
    """Exit code of the launch command: 2 the job file, 3 training failed, 4 the cluster refused."""
    rank: int | None = None
    """The worker on which it happened; none means the driver."""
    trace: str = ""
    """Last lines of the traceback, where the error was not one of the messages made for users."""


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
    proof: JsonObject = {}
    """What a profile of one training step saw: the operator, how often it ran, its GPU kernels;
    empty where the modules' classes are proof enough.
    """

    @property
    def proof_sentence(self) -> str:
        """The proof in words; empty where there is none."""
        if not self.proof:
            return ""
        return (
            f"{self.proof['operator']} ran {self.proof['calls']} times in one training step, for "
            f"{self.proof['modules']} modules"
        )

    @classmethod
    def of(cls, plan: Plan, proof: Mapping[str, Any] | None = None) -> "TransformReport":
        """Return what a plan that was carried out and verified comes to."""
        classes: dict[str, int] = {}
        for change in plan.changes.values():
            key = f"{change.before} -> {change.after}"
            classes[key] = classes.get(key, 0) + 1
        reasons: dict[str, list[str]] = {}
        for fqn, reason in plan.skipped.items():
            reasons.setdefault(reason, []).append(fqn)
        return cls(
            changed=len(plan.changes),
            skipped=len(plan.skipped),
            changed_by_class=classes,
            changed_modules=fold_names(plan.changes),
            skipped_reasons={reason: len(fqns) for reason, fqns in reasons.items()},
            skipped_modules={reason: fold_names(fqns) for reason, fqns in reasons.items()},
            notes=plan.notes,
            proof=dict(proof or {}),
        )


class Sample(Record):
    """A held-out prompt, and what the trained model answers."""

    prompt: str
    """The prompt as the model saw it, or its last message."""
    answer: str
    """The trained model's answer."""
    reference: str | None = None
    """The dataset's answer."""


class NodeReport(Record):
    """A node of the cluster as it was found before anything was scheduled."""

    address: str
    """Address of the node, or the autoscaler's group of nodes that are yet to start."""
    node_id: str = ""
    """Ray's id of the node; empty for one that is yet to start."""
    used: bool
    """Whether workers were allowed on it."""
    workers: int
    """Workers that it has room for."""
    reason: str = ""
    """The rule that left it out; empty where none did."""
    found: str = ""
    """What was found against it."""
    gpus: tuple[str, ...] = ()
    """Name of each GPU, or of each MIG slice."""
    compute_capability: str | None = None
    """Lowest compute capability of its GPUs, as 9.0; null without a GPU."""
    memory_gib: Number = None
    """Memory of its smallest GPU."""
    free_memory_gib: Number = None
    """Free memory of the GPU that had least of it."""
    driver_version: str | None = None
    """NVIDIA driver."""
    cuda_version: str | None = None
    """CUDA version PyTorch was built for there."""
    versions: dict[str, str | None] = {}
    """Version of each package there; null where it is not installed."""


class PreflightReport(Record):
    """What was found on the cluster's nodes before anything was scheduled."""

    nodes: tuple[NodeReport, ...]
    """Every node that was alive, and the groups that an autoscaler may start."""
    warnings: tuple[str, ...] = ()
    """What was found and did not stop the run."""
    seconds: Number = None
    """How long the nodes took to answer."""


class Baseline(Record):
    """The run named by compare_with, and this run measured by it."""

    output_dir: str
    """Its output_dir."""
    changed_keys: tuple[str, ...] = ()
    """The keys that change what is computed and differ, as `fp8: False then, True now`."""
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


class RunReport(Record):
    """The contract of report.json.

    Memory is in GiB (2**30 bytes), times are in seconds, steps are optimizer steps.
    """

    format_version: Literal[1] = 1
    """Version of this contract; raised when a field changes its meaning or goes."""
    status: Literal["running", "done", "failed"]
    """running is written at the start: where it stays, the driver was killed."""
    error: str | None = None
    """The error's whole message as the user saw it; null unless status is failed."""
    failure: Failure | None = None
    """The same error in its parts."""
    run_name: str = ""
    """Name of the run."""
    command: Arguments = ""
    """The command that started the run."""
    started_at: Number = None
    """When the launch command began, in unix seconds."""
    finished_at: Number = None
    """When the run ended, in unix seconds."""
    job: JobObject = {}
    """Every key of the job with its resolved value; values that may be secrets are hidden."""
    job_file: str = ""
    """Path of the job file on the driver."""
    overrides: tuple[Arguments, ...] = ()
    """The key=value arguments of the command line."""
    preflight: PreflightReport | None = None
    """The cluster's nodes, which of them were used, and why not the others."""
    world_size: int | None = None
    """Workers (ranks) of the run, of its last start where it was restarted."""
    device: str | None = None
    """What a worker computes on, as NVIDIA H200 or CPU."""
    versions: dict[str, str] = {}
    """Version of Python and of each package that takes part, on the workers."""
    steps: int = 0
    """Optimizer steps that were finished."""
    total_steps: int | None = None
    """Optimizer steps the run has by its plan."""
    epochs: Number = None
    """Passes over the training data that were finished."""
    train_loss: tuple[Point, ...] = ()
    """Training loss as [step, value]: mean per label token of that step."""
    eval_loss: tuple[Point, ...] = ()
    """Loss on the held-out rows as [step, value], mean per label token."""
    tokens_per_second_per_worker: Number = None
    """Median after warm-up, padding not counted."""
    step_seconds: Number = None
    """Median time of an optimizer step after warm-up."""
    data_wait_seconds: Number = None
    """Median time per step in which a worker waited for data."""
    peak_memory_gib: Number = None
    """Largest allocated GPU memory over all ranks; on CPU the largest worker's resident memory."""
    predicted_memory_gib: Number = None
    """The plan's prediction of a GPU's peak_memory_gib."""
    predicted_memory: JsonObject = {}
    """The prediction's parts in GiB: parameters, gradients, optimizer, activations, logits."""
    mfu_bf16: Number = None
    """Median share of the device's dense bf16 peak, as 0.42; null where the peak is not known."""
    restarts: int = 0
    """Times that lost workers were started again."""
    resumed_from_step: int | None = None
    """Step of the checkpoint the run last went on from; null if it never did."""
    transforms: dict[str, TransformReport] = {}
    """What each enabled transform changed and skipped, by its name; as planned where the run did
    not get to its end.
    """
    data: JsonObject = {}
    """Rows read, used and unusable (file, line and reason), tokens, sequences, packing."""
    batch: JsonObject = {}
    """Batch arithmetic: sequences per step, tokens per step, steps per epoch."""
    samples: tuple[Sample, ...] = ()
    """Answers of the trained model to held-out prompts."""
    timeline: dict[str, Annotated[float, BeforeValidator(_json)]] = {}
    """Seconds of each phase of the run, in order."""
    model_dir: str | None = None
    """Folder of the trained model; null until it is exported."""
    model_gib: Number = None
    """Its size on disk."""
    quantized_dir: str | None = None
    """Folder of the quantised model; null without quantisation-aware training."""
    quantized_gib: Number = None
    """Its size on disk."""
    quantized_logit_difference: Number = None
    """Largest difference between the logits of the quantised folder, loaded anew, and those of the
    model in memory with fake quantisation on.
    """
    quantized_comparison: str = ""
    """On how many tokens and where they were compared, and what was allowed."""
    baseline: Baseline | None = None
    """The run named by compare_with; null where none is."""
    notes: tuple[str, ...] = ()
    """Whatever else a reader should know, one sentence each."""


def describe_failure(error: BaseException, rank: int | None = None, trace: str = "") -> Failure:
    """Return the error in its parts; a foreign error's type and message are its `what`."""
    kind = type(error).__name__
    if isinstance(error, RaytrainAdvError):
        return Failure(
            kind=kind,
            what=error.what,
            found=error.found,
            fix=error.fix,
            exit_code=error.exit_code,
            rank=rank,
            trace=trace,
        )
    what = f"{kind}: {error}" if str(error) else kind
    return Failure(
        kind=kind, what=what, exit_code=RaytrainAdvError.exit_code, rank=rank, trace=trace
    )


def schema() -> dict[str, Any]:
    """Return the JSON schema of report.json, with each field's sentence."""
    return RunReport.model_json_schema()


def write(report: RunReport, output_dir: str | Path) -> Path:
    """Write report.json in one move, so that no reader sees half of it, and return its path.

    Raises:
        StorageError: when the file cannot be written.
    """
    text = json.dumps(report.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False)
    return write_text(text + "\n", Path(output_dir) / FILE_NAME)


def write_text(text: str, path: Path) -> Path:
    """Write a file of the report in one move, and return its path.

    Raises:
        StorageError: when the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A lone surrogate, which a dataset may hold, cannot be encoded; it is written as \udXXX.
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        fix = "free space, or choose an output_dir that can be written to"
        raise StorageError(
            "The report cannot be written", f"{path}: {error.strerror or error}", fix
        ) from error
    return path


def read(output_dir: str | Path) -> RunReport:
    """Read report.json.

    Raises:
        StorageError: when it is missing, or is not a report of this version.
    """
    path = Path(output_dir) / FILE_NAME
    try:
        return RunReport.model_validate_json(path.read_bytes())
    except OSError as error:
        found = f"{path}: {error.strerror or error}"
        raise StorageError(
            "There is no report to read", found, "give the output_dir of a run"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{path}: {'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
        fix = "read it with the version of raytrain_adv that wrote it"
        raise StorageError("The report is not one of this version", found, fix) from error


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
    if math.prod(map(len, axes)) == len(set(numbers)):
        return [_joined(texts, [_span(axis) for axis in axes])]
    return [_joined(texts, [str(n) for n in row]) for row in numbers]


def _joined(texts: tuple[str, ...], between: list[str]) -> str:
    return "".join(text + number for text, number in zip(texts, [*between, ""], strict=True))


def _span(values: list[int]) -> str:
    """Return sorted integers as 7, or as [0-3,8]."""
    if len(values) == 1:
        return str(values[0])
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return "[" + ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs) + "]"
