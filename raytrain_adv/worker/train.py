"""The line, top to bottom: hardware, data, model, transforms, sharding, weights, optimizer, steps,
export.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
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
from raytrain_adv.model.attention import is_flash
from raytrain_adv.model.build import build
from raytrain_adv.run.run import Run
from raytrain_adv.run.schedule import resolve_arithmetic
from raytrain_adv.transforms.applied import check_all, enabled, loaded_all, prepare_all, with_advice
from raytrain_adv.worker.checks.profile import Proof
from raytrain_adv.worker.finish import ExportFunction, export, sample_answers
from raytrain_adv.worker.install import attended, fetched, installed
from raytrain_adv.worker.loop import Loop
from raytrain_adv.worker.metrics import open_metrics
from raytrain_adv.worker.optim import build_optimizer
from raytrain_adv.worker.trials.loss import check_loss
from raytrain_adv.worker.twin import measure_twin


@parallel.refuse_eager
def train(job: JobConfig, run: Run, write_model: ExportFunction) -> dict[str, Any]:
    """Train on this rank and return what the report needs. Every rank of the run calls this.

    Raises:
        RaytrainAdvError: in the house form, for everything a user can do something about.
    """
    began_at = time.time()
    facts = hardware.detect(run.device)
    check_all(job, facts)

    with run.phase("open data"):
        prepared = prepare(job, partial(run.say, event="data"), rebuild=False)
        tokenizer = load_tokenizer(job)
    arithmetic = resolve_arithmetic(job, len(prepared.train), run.world_size)
    for transform in enabled(job):
        transform.check_length(arithmetic.total_steps)
    found = to_resume(job, run, arithmetic)
    open_metrics(job, run, arithmetic, found)

    with run.phase("model"):
        fetched(job, run, facts)
        model = build(job)
        attention = attended(job, run, model)
        plans = installed(job, run, model, prepare_all(job, model, facts))
        longest = pad_to(job).length(int(prepared.train.lengths.max()))
        plans = with_advice(job, plans, longest * arithmetic.micro_batch)
        predicted = memory.predict(model, job, run.world_size, longest, arithmetic.micro_batch)
        mesh = parallel.build_mesh(job, run.device)
        parallel.shard(model, job, mesh)
        weights.materialize(model, run.device, parallel.parameter_device(job))
        if job.model.train_from_scratch:
            weights.init_from_scratch(model, job, run.device)
        else:
            weights.load_pretrained(model, job, run.device)
        for transform in enabled(job):
            transform.initialize(model, job.train.seed)
        plans = loaded_all(job, model, plans)
        optimizer = build_optimizer(model, job)
    if found is not None:
        with run.phase("resume"):
            save.load(found, model, optimizer)
    for transform in enabled(job):
        transform.after_step(model)
    plans = check_loss(job, model, run, plans)

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    flash = is_flash(model)
    batches = Batches(job, prepared.train, arithmetic, run.rank, pad, flash)
    held_out = (
        Batches(job, prepared.eval, arithmetic, run.rank, pad, flash)
        if prepared.eval is not None
        else None
    )
    proof = Proof(job, run, plans)
    loop = Loop(job, run, model, optimizer, arithmetic, batches, held_out, proof)
    loop.run_from(found.progress if found is not None else None)
    proof.say_what_is_missing()

    samples = sample_answers(job, run, model, tokenizer, prepared)
    optimizer.state.clear()  # makes room for the quantized model beside the trained one
    exported = export(job, run, model, tokenizer, prepared, write_model)
    measure_twin(job, run, model, loop)
    return {
        **loop.figures(),
        "world_size": run.world_size,
        "device": facts.device_name,
        **attention,
        "versions": {name: v for name, v in facts.versions.items() if v is not None},
        "predicted_memory_gib": predicted.total,
        "predicted_memory": predicted.as_dict(),
        "batch": asdict(arithmetic),
        "resumed_from_step": found.progress.step if found is not None else None,
        "transforms": plans,
        "proof": proof.found,
        "data": prepared.stats,
        "samples": samples,
        **asdict(exported),
        "began_at": began_at,
        "timeline": run.timeline,
    }
