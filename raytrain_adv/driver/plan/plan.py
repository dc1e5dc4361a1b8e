"""The plan of a run: what it would do, how long it is, what it needs. No GPU, no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from torch import nn
from transformers import PreTrainedModel

from raytrain_adv import hardware
from raytrain_adv.config.job import JobConfig
from raytrain_adv.config.workers import accumulation, numbers
from raytrain_adv.data.batches.collate import pad_to
from raytrain_adv.data.prepare import PreparedData
from raytrain_adv.driver.plan import sweep
from raytrain_adv.driver.plan.data import DataSummary, look_at, summarize
from raytrain_adv.driver.plan.remarks import remarks
from raytrain_adv.driver.plan.text import WIDTH, render, render_brief, view
from raytrain_adv.estimate.advice import EXAMPLES, Advice, Case, Gpu, advise
from raytrain_adv.estimate.assumptions import Assumptions
from raytrain_adv.estimate.flops import training_flops_per_token
from raytrain_adv.estimate.host import HostNeed
from raytrain_adv.estimate.limits import Limit, Scale, Work
from raytrain_adv.estimate.memory import MemoryPrediction
from raytrain_adv.hardware import GIB, HardwareFacts
from raytrain_adv.model.attention import attention_name
from raytrain_adv.model.build import build, decoder_layers
from raytrain_adv.ops.bitsandbytes.linear import num_weights, quantized_linears
from raytrain_adv.run.schedule import Arithmetic, resolve_arithmetic
from raytrain_adv.transforms.applied import enabled, prepare_all, with_advice
from raytrain_adv.transforms.transform import Plan

__all__ = ["DataSummary", "RunPlan", "render", "render_brief", "resolve", "show"]

CPU_WORKERS = 2
"""Workers that ray_num_workers: auto takes on a cluster without GPUs."""


@dataclass(frozen=True)
class ModelSummary:
    """The model in a line."""

    architecture: str
    num_layers: int
    num_parameters: int
    num_trained: int
    dtypes: tuple[str, ...]
    attention: str
    """Implementation in transformers' terms: sdpa, eager, flash_attention_2, ..."""
    flops_per_token: float
    """Forward and backward, at the padded length."""


@dataclass(frozen=True)
class Size:
    """What another number of workers makes of a run."""

    workers: int
    accumulation_steps: int
    memory_gib: float
    """Predicted peak per GPU."""


@dataclass(frozen=True)
class RunPlan:
    """Everything a run settles before it starts."""

    job: JobConfig
    world_size: int
    assumption: str
    """Where the number of workers comes from when the job does not say it; else empty."""
    model: ModelSummary
    data: DataSummary
    arithmetic: Arithmetic
    seq_len: int
    """Tokens of the longest padded sequence."""
    transforms: Mapping[str, Plan]
    memory: MemoryPrediction
    host: HostNeed
    """Host memory on a node that is full of workers."""
    host_gib: float | None
    """What a node has of it; none where no GPU node is known."""
    gpus: tuple[Gpu, ...]
    """What the prediction is held against."""
    advice: Mapping[str, tuple[Advice, ...]]
    """GPU name -> changes worth making."""
    sizes: tuple[Size, ...] = ()
    """The run with each number of workers it may have; none where it is one throughout. The plan
    itself is then for the fewest, which need most memory."""
    scale: Scale | None = None
    """What many workers move and store; none where it was not asked for."""
    limits: tuple[Limit, ...] = ()
    """What more workers run into, the first one first; with `scale`."""
    remarks: tuple[str, ...] = ()
    """Sentences on keys without effect, and on what was not looked at."""

    def as_dict(self) -> dict[str, Any]:
        """Return the plan's numbers as JSON types."""
        return {
            "world_size": self.world_size,
            "model": asdict(self.model),
            "data": asdict(self.data),
            "batch": asdict(self.arithmetic),
            "memory": self.memory.as_dict(),
        }


def resolve(
    job: JobConfig,
    *,
    world_size: int,
    data: PreparedData | DataSummary,
    facts: HardwareFacts | None = None,
    assumption: str = "",
    assumed: Assumptions | None = None,
) -> RunPlan:
    """Work the plan out.

    Args:
        job: the loaded job.
        world_size: number of workers.
        data: the job's data, prepared or summarized.
        facts: a node the job will run on; without a GPU in it, memory is held against examples.
        assumption: why there are this many workers, where the job leaves it open.
        assumed: the cluster that traffic, checkpoints and limits are computed for; none leaves
            them out.

    Raises:
        JobError: when the model, the data or a transform cannot be as the job asks for.
    """
    summary = data if isinstance(data, DataSummary) else summarize(data)
    model = build(job)
    seq_len = pad_to(job).length(summary.longest)
    num_tokens = job.train.per_device_train_batch_size * seq_len
    transforms = with_advice(job, prepare_all(job, model, facts), num_tokens)
    arithmetic = resolve_arithmetic(job, summary.num_sequences, world_size)
    for transform in enabled(job):
        transform.check_length(arithmetic.total_steps)
    case = Case(job, model, world_size, seq_len)
    gpus = _gpus(facts)
    flops = training_flops_per_token(model, seq_len)
    memory = case.prediction()
    work = _work(case, summary, arithmetic, flops, gpus) if assumed else None
    return RunPlan(
        job=job,
        world_size=world_size,
        assumption=assumption,
        model=_model_summary(job, model, flops),
        data=summary,
        arithmetic=arithmetic,
        seq_len=seq_len,
        transforms=transforms,
        memory=memory,
        host=HostNeed.of(memory, min(world_size, _workers_per_node(facts, assumed))),
        host_gib=_host_gib(facts),
        gpus=gpus,
        advice={gpu.name: tuple(advise(case, gpu)) for gpu in gpus},
        sizes=tuple(_size(case, workers) for workers in numbers(job)),
        scale=work.at(world_size, assumed) if work and assumed else None,
        limits=tuple(work.limits(world_size, assumed)) if work and assumed else (),
    )


def _model_summary(job: JobConfig, model: PreTrainedModel, flops: float) -> ModelSummary:
    return ModelSummary(
        architecture=type(model).__name__,
        num_layers=len(decoder_layers(model)),
        num_parameters=num_weights(model),
        num_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        dtypes=_dtypes(model),
        attention=attention_name(job, model),
        flops_per_token=flops,
    )


def _work(
    case: Case, data: DataSummary, arithmetic: Arithmetic, flops: float, gpus: tuple[Gpu, ...]
) -> Work:
    """Return what a step computes, for what many workers make of it.

    Args:
        case: the model and its job.
        data: what it is trained on.
        arithmetic: its steps.
        flops: operations per token.
        gpus: the first is what it is computed on, unless on a CPU.
    """
    return Work(
        model=case.model,
        job=case.job,
        flops_per_token=flops,
        tokens_per_sequence=data.num_tokens / data.num_sequences,
        num_sequences=data.num_sequences,
        save_every=arithmetic.save_every,
        gpu="" if case.job.parallel.use_cpu else gpus[0].name,
    )


def _size(case: Case, workers: int) -> Size:
    of_that_size = replace(case, world_size=workers)
    return Size(workers, accumulation(case.job, workers), of_that_size.prediction().total)


def show(
    job: JobConfig,
    num_workers: int | None = None,
    verbose: bool = False,
    assumed: Assumptions | None = None,
) -> None:
    """Print the plan of a job: for `raytrain-adv plan job.yaml` and `--plan`.

    Args:
        job: the loaded job.
        num_workers: workers to plan for; none takes ray_num_workers.
        verbose: show the keys that have their default too.
        assumed: the cluster; where it has more workers than one node's, their traffic, checkpoints
            and limits are shown.

    Raises:
        JobError: when the job could not run as written.
    """
    console = Console(highlight=False)
    if job.sweep is not None:
        console.print(sweep.render(job.sweep), markup=False, soft_wrap=True)
    facts = hardware.detect()
    world_size, assumption = _workers(job, num_workers, facts)
    with console.status("reading the data"):
        data = look_at(job, lambda sentence: console.print(sentence, style="dim"))
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
    if console.is_terminal:
        console.print(view(plan, verbose), width=min(console.width, WIDTH))
    else:
        print(render(plan, verbose))


def _dtypes(model: nn.Module) -> tuple[str, ...]:
    plain = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    return (*sorted({m.form.kind for _, m in quantized_linears(model)}), *sorted(plain))


def _workers(job: JobConfig, asked: int | None, facts: HardwareFacts) -> tuple[int, str]:
    """Return the number of workers, and where it comes from unless the job says it."""
    if asked is not None:
        return asked, ""
    if isinstance(job.ray.ray_num_workers, int):
        return job.ray.ray_num_workers, ""
    if several := numbers(job):
        return several[0], "the fewest of ray_num_workers, which need most memory"
    if facts.num_gpus and not job.parallel.use_cpu:
        return facts.num_gpus, "ray_num_workers is auto; this machine has that many GPUs"
    return CPU_WORKERS, "ray_num_workers is auto; as on a cluster without GPUs (--workers N)"


def _workers_per_node(facts: HardwareFacts | None, assumed: Assumptions | None) -> int:
    """Return the GPUs of a node: as assumed, else of the one that is known."""
    if assumed is None and facts is not None and facts.device_type == "cuda":
        return max(facts.num_gpus, 1)
    return int((assumed or Assumptions()).gpus_per_node)


def _host_gib(facts: HardwareFacts | None) -> float | None:
    if facts is None or facts.device_type != "cuda":
        return None
    return facts.host_memory_bytes / GIB or None  # a node yet to start has not said it


def _gpus(facts: HardwareFacts | None) -> tuple[Gpu, ...]:
    if facts is not None and facts.device_type == "cuda":
        return (Gpu(facts.device_name, facts.device_memory_gib, is_known=True),)
    return EXAMPLES
