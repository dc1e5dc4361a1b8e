"""report.json: a run's job, what it did and what it reached; a contract that scripts read."""

import json
import traceback
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationError

from raytrain_adv.errors import EXIT_STOPPED, RaytrainAdvError, StorageError
from raytrain_adv.redaction import hide_environment
from raytrain_adv.report import parts
from raytrain_adv.report.parts import Arguments, JobObject, JsonObject, Number, Record
from raytrain_adv.storage.atomic import write_atomic
from raytrain_adv.storage.storage import storage_errors

FILE_NAME = "report.json"
TRACED_LINES = 30
OF_CONVERTED = (
    "quantized_dir", "quantized_gib", "quantized_logit_difference", "quantized_comparison",
)  # fmt: skip
"""Fields of the model that export converts from the trained one."""
T = TypeVar("T", bound=Record)


class RunReport(Record):
    """The contract of report.json.

    Memory is in GiB (2**30 bytes), times are in seconds, steps are optimizer steps.
    """

    format_version: Literal[1] = 1
    """Version of this contract; raised when a field changes its meaning or is removed."""
    status: Literal["running", "done", "stopped", "failed"]
    """running is written at the start: if it stays, the driver was killed. stopped: by Ctrl-C, by
    SIGTERM as `ray job stop` sends it, or by its sweep.
    """
    error: str | None = None
    """The error's whole message as the user saw it; null unless status is failed or stopped."""
    failure: parts.Failure | None = None
    """The same error in its parts."""
    run_name: str = ""
    """Name of the run."""
    command: Arguments = ""
    """The command that started the run."""
    started_at: Number = None
    """When the launch command began, in unix seconds."""
    finished_at: Number = None
    """When the run ended, in unix seconds."""
    job: JobObject = Field(default_factory=dict)
    """Every key of the job with its resolved value; values that may be secrets are hidden."""
    job_file: str = ""
    """Path of the job file on the driver."""
    overrides: tuple[Arguments, ...] = ()
    """The key=value arguments of the command line."""
    preflight: parts.PreflightReport | None = None
    """The cluster's nodes, which of them were used, and why not the others."""
    world_size: int | None = None
    """Workers (ranks) of the run; of its last start if it was restarted."""
    device: str | None = None
    """What a worker computes on, as NVIDIA H200 or CPU."""
    attention: str | None = None
    """What computed attention, in transformers' words: sdpa, eager, flash_attention_2, ..."""
    attention_trial: str | None = None
    """How near flash attention came to the definition before training; null if attention is
    PyTorch's own."""
    collectives: str | None = None
    """What moves FSDP2's shards and gradients, and why; null on one worker or a CPU."""
    sequence_parallel: str | None = None
    """Which workers shared each sequence; null if each had its own."""
    cuda_graph: str | None = None
    """Whether forward and backward passes were replayed as CUDA graphs, or why not."""
    compiled: str | None = None
    """How many graphs of torch.compile earlier runs had compiled, and how long it took; null if
    nothing was compiled."""
    model_notes: tuple[str, ...] = ()
    """How the checkpoint was read, and what differs from it in the model that was written."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Version of Python and of each package that is used, on the workers."""
    steps: int = 0
    """Optimizer steps that were finished."""
    total_steps: int | None = None
    """Optimizer steps that the plan has."""
    epochs: Number = None
    """Passes over the training data that were finished."""
    train_loss: tuple[parts.Point, ...] = ()
    """Training loss as [step, value]: mean per label token of that step."""
    eval_loss: tuple[parts.Point, ...] = ()
    """Loss on the held-out rows as [step, value], mean per label token."""
    best_step: int | None = None
    """Step of the evaluation whose model was exported, with load_best_model_at_end."""
    exact_answers: tuple[parts.Point, ...] = ()
    """Share of the held-out answers that greedy decoding gives exactly, as [step, value], with
    compute_accuracy."""
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
    predicted_memory: JsonObject = Field(default_factory=dict)
    """The prediction's parts in GiB: parameters, gradients, optimizer, activations, logits; and
    host memory per worker: what is offloaded, and the copies of checkpoints."""
    mfu_bf16: Number = None
    """Median share of the device's dense bf16 peak, as 0.42; null if the peak is not known."""
    warnings: tuple[str, ...] = ()
    """Why the run may have learned nothing: zero gradients, a loss of guessing, a loss that rose or
    never fell; one sentence each."""
    restarts: int = 0
    """Restarts of the workers after some were lost."""
    skipped_steps: int = 0
    """Optimizer steps whose update was skipped because of a bad loss (on_bad_loss: skip)."""
    starts: tuple[parts.Start, ...] = ()
    """Each start of the workers: at which step, how many, and which nodes were lost before."""
    resumed_from_step: int | None = None
    """Step of the checkpoint the run last resumed from; null if it never did."""
    transforms: dict[str, parts.TransformReport] = Field(default_factory=dict)
    """What each enabled transform changed and skipped, by its name; as planned if the run did not
    finish.
    """
    data: JsonObject = Field(default_factory=dict)
    """Rows read, used and unusable (file, line and reason), tokens, sequences, packing."""
    batch: JsonObject = Field(default_factory=dict)
    """Batch arithmetic: sequences per step, tokens per step, steps per epoch."""
    samples: tuple[parts.Sample, ...] = ()
    """Answers of the trained model to held-out prompts."""
    timeline: dict[str, parts.Seconds] = Field(default_factory=dict)
    """Seconds of each phase of the run, in order."""
    model_dir: str | None = None
    """Folder of the trained model; null until it is exported."""
    variants: tuple[parts.Variant, ...] = ()
    """What quantization costs, and what training with it regains, in held-out loss."""
    recovered: Number = None
    """Share of the quantization loss that training recovered: (PTQ - trained) / (PTQ - bf16), of
    the twin's weights if there is one, else of those at which fake quantization began; null without
    training for it, if PTQ loses next to nothing, and if that ended below weights that have not
    been trained as long.
    """
    quantized_eval_loss: Number = None
    """Held-out loss of the run's quantized model; null without one."""
    model_gib: Number = None
    """Its size on disk."""
    quantized_dir: str | None = None
    """Folder of the quantized model; null without quantization-aware training."""
    quantized_gib: Number = None
    """Its size on disk."""
    quantized_logit_difference: Number = None
    """Largest difference between the logits of the quantized folder, loaded again, and those of the
    model in memory with fake quantization enabled.
    """
    quantized_comparison: str = ""
    """On how many tokens and where they were compared, and what was allowed."""
    uploads: tuple[parts.Upload, ...] = ()
    """What push_to_hub uploaded, or why it did not; empty without it, and until the run ended."""
    baseline: parts.Baseline | None = None
    """The run named by compare_with; null if there is none."""
    notes: tuple[str, ...] = ()
    """Anything else a reader should know, one sentence each."""

    @property
    def seconds(self) -> float | None:
        """From the launch command's start to the run's end; None while it runs."""
        if self.started_at is None or self.finished_at is None:
            return None
        return self.finished_at - self.started_at

    @property
    def converted(self) -> tuple[str, str | None, float | None]:
        """Label, folder and size of the model that export converted; nulls without one."""
        return "quantized", self.quantized_dir, self.quantized_gib

    @property
    def converted_loss(self) -> float | None:
        """Held-out loss of the model that export converted; none without one."""
        return self.quantized_eval_loss

    @property
    def comparison(self) -> str:
        """How near the converted model is to the trained one; empty without one."""
        if self.quantized_logit_difference is None:
            return ""
        return (
            f"logits differ by {self.quantized_logit_difference:.3g} from those of training "
            f"({self.quantized_comparison})"
        )


def describe_failure(error: BaseException) -> parts.Failure:
    """Return the error in its parts; a foreign error's type and message are its `what`."""
    kind = type(error).__name__
    if isinstance(error, RaytrainAdvError):
        words = {"what": error.what, "found": error.found, "fix": error.fix}
    else:
        lines = "".join(traceback.format_exception(error)).splitlines()
        what = f"{kind}: {error}" if str(error) else kind
        words = {"what": what, "trace": "\n".join(lines[-TRACED_LINES:])}
    code = (error if isinstance(error, RaytrainAdvError) else RaytrainAdvError).exit_code
    code = EXIT_STOPPED if isinstance(error, KeyboardInterrupt) else code
    rank = getattr(error, "rank", None)
    return parts.Failure(kind=kind, **words, exit_code=code, rank=rank)


def write(report: RunReport, output_dir: str | Path) -> Path:
    """Write report.json atomically, and return its path. Raises StorageError."""
    text = json.dumps(report.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False)
    return write_text(text + "\n", Path(output_dir) / FILE_NAME)


def write_text(text: str, path: Path) -> Path:
    """Write a file atomically, without secrets of the environment. Raises StorageError."""
    with storage_errors("The report cannot be written", str(path)):
        write_atomic(path, hide_environment(text))
    return path


def read(output_dir: str | Path) -> RunReport:
    """Read report.json. Raises StorageError."""
    return read_record(RunReport, Path(output_dir) / FILE_NAME)


def report_of(folder: Path, step: int) -> RunReport | None:
    """Return a run's report if its figures are of the model of this step: of a run that is done,
    and exported that one.
    """
    try:
        report = read(folder)
    except StorageError:
        return None
    exported = report.steps if report.best_step is None else report.best_step
    return report if report.status == "done" and exported == step else None


def read_record(kind: type[T], path: Path) -> T:
    """Read a report. Raises StorageError if it is missing, or is not one of this version."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        found, fix = f"{path}: {error.strerror or error}", "give the output_dir of a run"
        raise StorageError("There is no report to read", found, fix) from error
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{path}: {'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
        fix = "read it with the version of raytrain_adv that wrote it"
        raise StorageError("The report is not one of this version", found, fix) from error
