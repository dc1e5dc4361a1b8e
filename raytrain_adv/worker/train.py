"""One worker's run in order, from the hardware to the export."""

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raytrain_adv import hardware
from raytrain_adv.checkpoint import save
from raytrain_adv.checkpoint.folders import Found, Progress
from raytrain_adv.checkpoint.resume import refuse_other_base, to_resume
from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.batches.collate import Way, pad_to
from raytrain_adv.data.batches.loader import Batches
from raytrain_adv.data.prepare import PreparedData, prepare
from raytrain_adv.data.tokens.tokenizer import load_tokenizer
from raytrain_adv.estimate import memory
from raytrain_adv.hardware import HardwareFacts
from raytrain_adv.model import parallel, weights
from raytrain_adv.model.adapter import load_adapter, merge_adapters, trained
from raytrain_adv.model.build import build
from raytrain_adv.model.notes import cpu_notes, model_notes
from raytrain_adv.model.weight_files import model_folder
from raytrain_adv.ops.loss.routers import leave_padding_out
from raytrain_adv.run.run import Run
from raytrain_adv.run.schedule import Arithmetic, resolve_arithmetic
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.lora import Lora
from raytrain_adv.transforms.targets import check_trained_on
from raytrain_adv.transforms.transform import Plan
from raytrain_adv.worker.checks.step import Checks
from raytrain_adv.worker.compile_cache import found_compiled, keep_compiled
from raytrain_adv.worker.evaluation import evaluate_at_start, restore_best
from raytrain_adv.worker.finish import ExportFunction, evaluate_twins, export, sample_answers
from raytrain_adv.worker.install import check_attention, fetch, install, training_loss
from raytrain_adv.worker.loop import TrainState, log_and_save, train_step, training
from raytrain_adv.worker.metrics import open_metrics
from raytrain_adv.worker.optim import build_optimizer
from raytrain_adv.worker.trials.causal import check_causal
from raytrain_adv.worker.trials.collectives import choose
from raytrain_adv.worker.trials.loss import check_loss
from raytrain_adv.worker.trials.packing import check_packing
from raytrain_adv.worker.trials.sequence_parallel import split_sequences


@parallel.refuse_eager
def train(job: JobConfig, run: Run, write_model: ExportFunction) -> dict[str, Any]:
    """Train on this rank and return what the report needs; every rank of the run calls this. Raises
    RaytrainAdvError for everything that a user can correct.
    """
    began_at = time.time()
    facts = hardware.detect(run.device)
    keep_compiled(job, run)
    transforms = Transforms(job)
    transforms.check(facts)
    with run.phase("open data"):
        prepared = prepare(job, partial(run.say, event="data"), rebuild=False)
        tokenizer = load_tokenizer(job)
    arithmetic = resolve_arithmetic(job, len(prepared.train), run.world_size)
    transforms.check_length(arithmetic.total_steps)
    longest = pad_to(job).length(int(prepared.train.lengths.max()))
    tokens = longest // job.parallel.sequence_parallel_size * arithmetic.micro_batch
    found = to_resume(job, run, arithmetic)
    open_metrics(job, run, arithmetic, found)

    with run.phase("model"):
        run.on_main(lambda: fetch(job, facts, partial(run.say, event="fetch")))
        model = build(job)
        chosen = check_attention(job, run, model) | {"model_notes": say_notes(job, run, model)}
        plans = transforms.prepare(model, facts, tokens)
        job, predicted = sized(job, run, model, facts, longest, arithmetic.micro_batch)
        plans = install(run, transforms, model, plans)
        chosen |= sharded(job, run, model)
        plans = load_weights(run, transforms, model, plans)
        optimizer = build_optimizer(model, job)
    progress = resume(run, found, transforms, model, optimizer)
    check_causal(job, model, run)
    plans = check_loss(job, model, run, plans)
    way = check_packing(job, model, run)
    chosen |= {"sequence_parallel": split_sequences(job, model, run, way)}
    batches = batches_of(job, run, model, prepared, tokenizer, arithmetic, way)
    loss = training_loss(job, run, model)
    state = TrainState(job, run, transforms, model, optimizer, arithmetic, *batches, loss, progress)
    checks = Checks(job, run, model, transforms, plans, state.batches, progress)

    with training(state):
        evaluate_at_start(state)
        for step in range(state.first_step, arithmetic.total_steps):
            train_step(state, checks, step)
            if not log_and_save(state, checks, step + 1):
                break
    restore_best(state)
    checks.finish(state.evaluations)
    samples = sample_answers(state, tokenizer, prepared)
    optimizer.state.clear()  # makes room for a converted model next to the trained one
    exported = export(job, run, model, tokenizer, prepared, write_model)
    evaluate_twins(state, model)
    return {
        **figures(state, checks, facts, predicted),
        **chosen,
        **exported.figures(),
        "data": prepared.stats,
        "samples": samples,
        "resumed_from_step": progress.step if progress is not None else None,
        "began_at": began_at,
    }


def sized(
    job: JobConfig,
    run: Run,
    model: PreTrainedModel,
    facts: HardwareFacts,
    longest: int,
    micro_batch: int,
) -> tuple[JobConfig, memory.MemoryPrediction]:
    """Return the job with what the GPUs' memory decides, and its predicted memory."""
    passes = (run.world_size, longest, micro_batch)
    gib = run.agree(int(facts.device_memory_gib), dist.ReduceOp.MIN)
    on_gpu = facts.device_type == "cuda"
    decided = memory.settled(model, job, *passes, gib if on_gpu else None)
    on_cpu = decided.parallel.model_copy(update={"use_cpu": not on_gpu})
    predicted = memory.predict(model, replace(decided, parallel=on_cpu), *passes)
    if decided is not job:
        text = "layers stay gathered from forward to backward (fsdp_reshard_after_forward: false)"
        run.say(f"{text}: predicted peak {predicted.total:.1f} of {gib} GiB", event="memory")
    return decided, predicted


def sharded(job: JobConfig, run: Run, model: PreTrainedModel) -> dict[str, str | None]:
    """Shard the model over the workers; return what moves its bytes, for the report."""
    mesh = parallel.build_mesh(job, run.device)
    copies, found = choose(job, run, mesh)
    parallel.shard(model, job, mesh, copies)
    return {"collectives": found}


def say_notes(job: JobConfig, run: Run, model: PreTrainedModel) -> tuple[str, ...]:
    """Print what a user should know about how the checkpoint is read; return it."""
    notes = model_notes(job, model)
    for note in (*notes, *cpu_notes(job, run.device.type)):
        run.say(note, event="model")
    return notes


def load_weights(
    run: Run, transforms: Transforms, model: PreTrainedModel, plans: Mapping[str, Plan]
) -> dict[str, Plan]:
    """Give the sharded model memory and values: the checkpoint's or random ones, those of what
    transforms added, and of an adapter to continue. Return the plans with what was found.
    """
    job = transforms.job
    weights.materialize(model, run.device, parallel.parameter_device(job))
    if job.model.train_from_scratch:
        weights.init_from_scratch(model, job, run.device)
    else:
        weights.load_pretrained(model, job, run.device)
        lora = job.transform(Lora)
        run.on_main(lambda: check_trained_on(lora.folders, model_folder(job)))
        merge_adapters(model, job)
    plans = transforms.initialize(model, plans, job.train.seed)
    if job.transform(Lora).enabled:
        trained(model)  # a name that PEFT would not find is refused now, not after training
    if folder := job.transform(Lora).continued:
        load_adapter(model, Path(folder))
    return plans


def resume(
    run: Run,
    found: Found | None,
    transforms: Transforms,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
) -> Progress | None:
    """Load the checkpoint to continue from, if there is one, and return how far it is."""
    if found is not None:
        with run.phase("resume"):
            run.on_main(lambda: refuse_other_base(transforms.job, found))
            save.load(found, model, optimizer)
    transforms.after_step(model)
    return found.progress if found is not None else None


def batches_of(
    job: JobConfig,
    run: Run,
    model: PreTrainedModel,
    prepared: PreparedData,
    tokenizer: PreTrainedTokenizerBase,
    arithmetic: Arithmetic,
    way: Way,
) -> tuple[Batches, Batches | None, dict[str, Batches]]:
    """Return this rank's batches of the training rows, the held-out rows, and those by dataset."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    to_batches = partial(
        Batches,
        job,
        arithmetic=arithmetic,
        rank=run.rank,
        pad_token_id=pad,
        way=way,
        tells_padding=leave_padding_out(model),
    )
    held_out = to_batches(prepared.eval) if prepared.eval is not None else None
    each = {name: to_batches(rows) for name, rows in prepared.eval_each.items()}
    return to_batches(prepared.train), held_out, each


def figures(
    state: TrainState, checks: Checks, facts: HardwareFacts, predicted: memory.MemoryPrediction
) -> dict[str, Any]:
    """Return what the report needs of the steps, their checks, the machine and its memory."""
    return {
        **state.meter.figures(),
        "cuda_graph": state.passes.summary,
        "compiled": found_compiled(state.job, state.run),
        "skipped_steps": checks.loss.num_skipped,
        "world_size": state.run.world_size,
        "device": facts.device_name,
        "versions": {name: v for name, v in facts.versions.items() if v is not None},
        "predicted_memory_gib": predicted.total,
        "predicted_memory": predicted.as_dict(),
        "batch": asdict(state.arithmetic),
        "transforms": checks.plans,
        "proof": checks.proof,
        "timeline": state.run.timeline,
    }
