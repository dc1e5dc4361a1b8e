"""One worker's run in order, from the hardware to the export."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from raytrain_adv import hardware
from raytrain_adv.checkpoint import save
from raytrain_adv.checkpoint.resume import to_resume
from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.batches.collate import pad_to
from raytrain_adv.data.batches.loader import Batches
from raytrain_adv.data.prepare import prepare
from raytrain_adv.data.tokens.tokenizer import load_tokenizer
from raytrain_adv.estimate import memory
from raytrain_adv.model import parallel, weights
from raytrain_adv.model.adapter import load_adapter
from raytrain_adv.model.build import build
from raytrain_adv.model.notes import model_notes
from raytrain_adv.run.run import Run
from raytrain_adv.run.schedule import resolve_arithmetic
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.lora import Lora
from raytrain_adv.worker.checks.step import Checks
from raytrain_adv.worker.evaluation import evaluate_held_out, evaluate_variants, restore_best
from raytrain_adv.worker.finish import ExportFunction, evaluate_twins, export, sample_answers
from raytrain_adv.worker.install import check_attention, fetch_on_main, install, training_loss
from raytrain_adv.worker.loop import TrainState, log_and_save, train_step, training
from raytrain_adv.worker.metrics import open_metrics
from raytrain_adv.worker.optim import build_optimizer
from raytrain_adv.worker.trials.loss import check_loss
from raytrain_adv.worker.trials.packing import check_packing


@parallel.refuse_eager
def train(job: JobConfig, run: Run, write_model: ExportFunction) -> dict[str, Any]:
    """Train on this rank and return what the report needs. Every rank of the run calls this.

    Raises:
        RaytrainAdvError: with what, found and fix, for everything that a user can correct.
    """
    began_at = time.time()
    facts = hardware.detect(run.device)
    transforms = Transforms(job)
    transforms.check(facts)

    with run.phase("open data"):
        prepared = prepare(job, partial(run.say, event="data"), rebuild=False)
        tokenizer = load_tokenizer(job)
    arithmetic = resolve_arithmetic(job, len(prepared.train), run.world_size)
    transforms.check_length(arithmetic.total_steps)
    longest = pad_to(job).length(int(prepared.train.lengths.max()))
    found = to_resume(job, run, arithmetic)
    progress = found.progress if found is not None else None
    open_metrics(job, run, arithmetic, found)

    with run.phase("model"):
        fetch_on_main(job, run, facts)
        model = build(job)
        attention = check_attention(job, run, model)
        for note in (notes := model_notes(job, model)):
            run.say(note, event="model")
        plans = transforms.prepare(model, facts, longest * arithmetic.micro_batch)
        plans = install(run, transforms, model, plans)
        predicted = memory.predict(model, job, run.world_size, longest, arithmetic.micro_batch)
        parallel.shard(model, job, parallel.build_mesh(job, run.device))
        weights.materialize(model, run.device, parallel.parameter_device(job))
        if job.model.train_from_scratch:
            weights.init_from_scratch(model, job, run.device)
        else:
            weights.load_pretrained(model, job, run.device)
        plans = transforms.initialize(model, plans, job.train.seed)
        if folder := job.transform(Lora).adapter_name_or_path:
            load_adapter(model, Path(folder))
        optimizer = build_optimizer(model, job)
    if found is not None:
        with run.phase("resume"):
            save.load(found, model, optimizer)
    transforms.after_step(model)
    plans = check_loss(job, model, run, plans)
    way = check_packing(job, model, run)

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    to_batches = partial(
        Batches, job, arithmetic=arithmetic, rank=run.rank, pad_token_id=pad, way=way
    )
    batches = to_batches(prepared.train)
    held_out = to_batches(prepared.eval) if prepared.eval is not None else None
    each = {name: to_batches(rows) for name, rows in prepared.eval_each.items()}
    loss = training_loss(job, run, model)
    checks = Checks(job, run, model, transforms, plans, batches, progress)
    state = TrainState(
        job, run, transforms, model, optimizer, arithmetic, batches, held_out, each, loss, progress
    )
    with training(state):
        if state.first_step == 0 and not job.model.train_from_scratch:
            evaluate_variants(state, 0)
        if state.first_step == 0 and job.output.eval_on_start and held_out is not None:
            evaluate_held_out(state, held_out, 0)
        for step in range(state.first_step, arithmetic.total_steps):
            train_step(state, checks, step)
            if not log_and_save(state, checks, step + 1):
                break
    restore_best(state)
    checks.report_unproven()
    checks.learning.finish(state.evaluations)

    samples = sample_answers(state, tokenizer, prepared)
    optimizer.state.clear()  # makes room for a converted model next to the trained one
    exported = export(job, run, model, tokenizer, prepared, write_model)
    evaluate_twins(state, model)
    return {
        **state.meter.figures(),
        "skipped_steps": checks.loss.num_skipped,
        "world_size": run.world_size,
        "device": facts.device_name,
        **attention,
        "model_notes": notes,
        "versions": {name: v for name, v in facts.versions.items() if v is not None},
        "predicted_memory_gib": predicted.total,
        "predicted_memory": predicted.as_dict(),
        "batch": asdict(arithmetic),
        "resumed_from_step": progress.step if progress is not None else None,
        "transforms": plans,
        "proof": checks.proof,
        "data": prepared.stats,
        "samples": samples,
        **exported.figures(),
        "began_at": began_at,
        "timeline": run.timeline,
    }
