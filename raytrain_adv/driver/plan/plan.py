"""The plan of a run: its steps, its transforms, its memory. Needs neither a GPU nor weights."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel

from raytrain_adv import hardware, tables
from raytrain_adv.config.job import (
    CPU_WORKERS,
    JobConfig,
    accumulation,
    numbers,
    refuse_without_graph,
)
from raytrain_adv.data.batches.collate import pad_to
from raytrain_adv.data.prepare import PreparedData
from raytrain_adv.data.shown import plain, shown_rows
from raytrain_adv.driver.output import upload
from raytrain_adv.driver.output.output_dir import decided
from raytrain_adv.driver.plan.data import DataSummary, measure, summarize
from raytrain_adv.driver.plan.text import render, render_brief, sweep_view, view
from raytrain_adv.errors import ClusterError, JobError, StorageError
from raytrain_adv.estimate.advice import EXAMPLES, Advice, Case, Gpu, advise
from raytrain_adv.estimate.assumptions import Assumptions
from raytrain_adv.estimate.flops import training_flops_per_token
from raytrain_adv.estimate.launches import why_no_graph
from raytrain_adv.estimate.limits import Limit, Scale, Work
from raytrain_adv.estimate.memory import HostNeed, MemoryPrediction, dtypes, settled
from raytrain_adv.export.layout import is_gguf
from raytrain_adv.hardware import HardwareFacts
from raytrain_adv.model.attention import attention_name
from raytrain_adv.model.build import build, decoder_layers
from raytrain_adv.model.notes import cpu_notes, model_notes
from raytrain_adv.model.vocabulary import read_tokenizer
from raytrain_adv.ops.bitsandbytes.linear import num_weights
from raytrain_adv.ops.fake_quant.gguf_file import name_of_tokenizer
from raytrain_adv.report import record
from raytrain_adv.run.schedule import Arithmetic, resolve_arithmetic
from raytrain_adv.text import GIB, plural
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.transform import Plan

__all__ = ["RunPlan", "render", "render_brief", "resolve", "show"]


@dataclass(frozen=True)
class ModelSummary:
    """The model in numbers."""

    architecture: str
    num_layers: int
    num_parameters: int
    num_trained: int
    dtypes: tuple[str, ...]
    attention: str  # implementation in transformers' terms: sdpa, eager, flash_attention_2, ...
    flops_per_token: float  # forward and backward, at the padded length
    notes: tuple[str, ...] = ()  # how the checkpoint is read and written


@dataclass(frozen=True)
class Size:
    """A run with another number of workers."""

    workers: int
    accumulation_steps: int
    memory_gib: float  # predicted peak per GPU


@dataclass(frozen=True)
class RunPlan:
    """Everything that is decided before a run starts."""

    job: JobConfig
    world_size: int
    assumption: str  # where the number of workers comes from; empty if the job sets it
    model: ModelSummary
    data: DataSummary
    arithmetic: Arithmetic
    seq_len: int  # tokens of the longest padded sequence
    no_graph: str  # why passes are not recorded as CUDA graphs; empty if they are
    transforms: Mapping[str, Plan]
    memory: MemoryPrediction
    host: HostNeed  # host memory of a full node's workers
    host_gib: float | None  # host memory of a node; None if no GPU node is known
    gpus: tuple[Gpu, ...]  # GPUs to compare the prediction with
    advice: Mapping[str, tuple[Advice, ...]]  # GPU name -> changes worth making
    sizes: tuple[Size, ...] = ()
    """The run with each allowed number of workers; empty if the number is fixed. The plan itself is
    for the fewest, which need most memory."""
    scale: Scale | None = None  # traffic and checkpoints of many workers, if requested
    limits: tuple[Limit, ...] = ()  # limits of more workers, in order; with `scale`
    remarks: tuple[str, ...] = ()  # sentences on keys without effect, and on what was not checked


def resolve(
    job: JobConfig,
    *,
    world_size: int,
    data: PreparedData | DataSummary,
    facts: HardwareFacts | None = None,
    assumption: str = "",
    assumed: Assumptions | None = None,
) -> RunPlan:
    """Make the plan. Raises JobError if the model, the data or a transform does not fit the job.

    Args:
        job: the loaded job.
        world_size: number of workers.
        data: the job's data, prepared or summarized.
        facts: a node the job will run on; without a GPU, memory is compared with example GPUs.
        assumption: where world_size comes from, if the job does not set it.
        assumed: the cluster for which traffic, checkpoints and limits are computed, if any.
    """
    summary = data if isinstance(data, DataSummary) else summarize(data)
    model = build(job)
    seq_len = pad_to(job).length(summary.longest)
    transforms = Transforms(job)
    batch = job.train.per_device_train_batch_size
    tokens = batch * (seq_len // job.parallel.sequence_parallel_size)
    plans = transforms.prepare(model, facts, tokens)
    _refuse_tokenizer(job, model)
    arithmetic = resolve_arithmetic(job, summary.num_sequences, world_size)
    transforms.check_length(arithmetic.total_steps)
    gpus, per_node, host_gib = _node(facts)
    known = gpus[0].memory_gib if gpus is not EXAMPLES else None
    decided = settled(model, job, world_size, seq_len, batch, known)
    case = Case(decided, model, world_size, seq_len)
    if assumed or per_node is None:
        per_node = int((assumed or Assumptions()).gpus_per_node)
    flops = training_flops_per_token(model, seq_len)
    no_graph = why_no_graph(model, job, world_size, tokens)
    refuse_without_graph(job, no_graph)
    memory = case.prediction()
    mean = summary.num_tokens / summary.num_sequences
    name = "" if job.parallel.use_cpu else gpus[0].name
    work = Work(model, decided, flops, mean, summary.num_sequences, arithmetic.save_every, name)
    return RunPlan(
        job=job,
        world_size=world_size,
        assumption=assumption,
        model=_model_summary(job, model, flops),
        data=summary,
        arithmetic=arithmetic,
        seq_len=seq_len,
        no_graph=no_graph,
        transforms=_with_gain(transforms, plans, work, world_size),
        memory=memory,
        host=HostNeed.of(memory, min(world_size, per_node)),
        host_gib=host_gib,
        gpus=gpus,
        advice={gpu.name: tuple(advise(case, gpu)) for gpu in gpus},
        sizes=tuple(_size(case, workers) for workers in numbers(job)),
        scale=work.at(world_size, assumed) if assumed else None,
        limits=tuple(work.limits(world_size, assumed)) if assumed else (),
    )


def _refuse_tokenizer(job: JobConfig, model: PreTrainedModel) -> None:
    """Raise JobError if the job exports GGUF and llama.cpp cannot read the tokenizer."""
    if not is_gguf(job):
        return
    fast = getattr(read_tokenizer(job), "backend_tokenizer", None)
    tokenizer = json.loads(fast.to_str()) if fast is not None else {}
    name_of_tokenizer(tokenizer, model.config.vocab_size)


def _with_gain(
    transforms: Transforms, plans: Mapping[str, Plan], work: Work, world_size: int
) -> Mapping[str, Plan]:
    """Return the plans with what it gains that a transform changes what is gathered."""
    gain = work.gain_of_gathering(world_size) if world_size > 1 else ""
    changed = [t.name for t in transforms if gain and t.gathering(work.model).sizes]
    return {**plans, **{name: plans[name].with_notes(gain) for name in changed}}


def _size(case: Case, workers: int) -> Size:
    peak = replace(case, world_size=workers).prediction().total
    return Size(workers, accumulation(case.job, workers), peak)


def _node(facts: HardwareFacts | None) -> tuple[tuple[Gpu, ...], int | None, float | None]:
    """Return the GPUs to compare with, their number, and the GiB of host memory, if known."""
    if facts is None or facts.device_type != "cuda":
        return EXAMPLES, None, None
    gpu = Gpu(facts.device_name, facts.device_memory_gib)
    host_gib = facts.host_memory_bytes / GIB or None  # unknown for a node that is not started yet
    return (gpu,), max(facts.num_gpus, 1), host_gib


def _model_summary(job: JobConfig, model: PreTrainedModel, flops: float) -> ModelSummary:
    return ModelSummary(
        architecture=type(model).__name__,
        num_layers=len(decoder_layers(model)),
        num_parameters=num_weights(model),
        num_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        dtypes=dtypes(model),
        attention=attention_name(job, model),
        flops_per_token=flops,
        notes=model_notes(job, model),
    )


def show(
    job: JobConfig,
    num_workers: int | None = None,
    verbose: bool = False,
    assumed: Assumptions | None = None,
) -> None:
    """Print the plan of a job. Traffic, checkpoints and limits are shown if a cluster is assumed or
    if the workers, by default ray_num_workers, need more than one node. Raises JobError.
    """
    console = Console(highlight=False, soft_wrap=True, markup=False)
    if job.sweep is not None:
        tables.show(sweep_view(job.sweep))
    facts = hardware.detect()
    world_size, assumption = _workers(job, num_workers, facts)
    with console.status("reading the data"):
        data = measure(job, lambda sentence: console.print(sentence, style="dim"))
    cluster = assumed or Assumptions()
    plan = resolve(
        job,
        world_size=world_size,
        data=data,
        facts=facts,
        assumption=assumption,
        assumed=cluster if world_size > cluster.gpus_per_node or assumed else None,
    )
    plan = replace(plan, remarks=remarks(job, world_size, facts))
    tables.show(view(plan, verbose))
    for row in shown_rows(job, 1):
        console.print(f"\n{plain(row)}\nMore of them: raytrain-adv data {job.source}")


def _workers(job: JobConfig, requested: int | None, facts: HardwareFacts) -> tuple[int, str]:
    """Return the number of workers, and where it comes from unless the job sets it."""
    if requested is not None:
        return requested, ""
    if isinstance(job.ray.ray_num_workers, int):
        return job.ray.ray_num_workers, ""
    if several := numbers(job):
        return several[0], "the fewest of ray_num_workers, which need most memory"
    if facts.num_gpus and not job.parallel.use_cpu:
        return facts.num_gpus, "ray_num_workers is auto; this machine has that many GPUs"
    return CPU_WORKERS, "ray_num_workers is auto; as on a cluster without GPUs (--workers N)"


def remarks(job: JobConfig, world_size: int, facts: HardwareFacts) -> tuple[str, ...]:
    """Return the sentences below a plan: keys without effect, and what was not checked."""
    preflight = f"raytrain-adv preflight {job.source}".rstrip()
    return (
        *job.notes,
        *_output_remarks(job),
        *upload.remarks(job),
        *_machine_remarks(job, world_size, facts),
        f"no cluster was checked for this job: {preflight} does that",
    )


def _output_remarks(job: JobConfig) -> Iterator[str]:
    """Yield what a launch does to a run in output_dir. Buckets are not read for a plan."""
    path = job.output.resume_from_checkpoint
    if isinstance(path, str) and "://" not in path and not Path(path).is_dir():
        yield f"resume_from_checkpoint: there is no folder {path} on this machine"
    if (other := job.output.compare_with) is not None:
        try:
            record.read(other)
        except StorageError as error:
            yield f"a launch is refused: {error.what} (compare_with: {other})"
    if job.sweep is not None or "://" in (job.ray.ray_storage_path or ""):
        return
    try:
        found = decided(job)
    except (JobError, StorageError) as error:
        yield f"a launch is refused: {error.what} (output_dir: {job.output.output_dir})"
        return
    if found.remark:
        yield f"in a launch, {found.remark}"
    elif found.finished:
        yield f"a launch does nothing: this job has already finished in {found.folder}"


def _machine_remarks(job: JobConfig, world_size: int, facts: HardwareFacts) -> Iterator[str]:
    if not job.parallel.use_cpu and facts.device_type != "cuda":
        yield (
            "this machine has no GPU, and the plan is for GPUs: a Ray started here would train on "
            "the CPU; use_cpu: true plans for that"
        )
        needs = {"cuda_graph: true": job.parallel.cuda_graph}
        needs["fsdp_collectives: copies"] = job.parallel.fsdp_collectives == "copies"
        for key in (key for key, is_set in needs.items() if is_set):
            yield f"{key}: a Ray without GPUs refuses this job"
    elif not job.parallel.use_cpu and facts.num_gpus < world_size:
        yield f"this machine has {plural(facts.num_gpus, 'GPU')} for {world_size:,} workers"
    if job.parallel.use_cpu:
        yield from cpu_notes(job, "cpu")
    for transform in Transforms(job):
        try:
            transform.check(facts)
        except ClusterError as error:
            yield f"not on this machine: {error.what}"
