"""Fetch and install what the transforms planned on each worker, and check that all ranks agree."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.errors import JobError, TrainingError
from raytrain_adv.hardware import HardwareFacts
from raytrain_adv.model import attention, parallel, weights
from raytrain_adv.model.build import build
from raytrain_adv.model.parallel import compute_dtype
from raytrain_adv.ops.loss.function import (
    LossFunction,
    asft_loss,
    dft_sum,
    distill_loss,
    eaft_sum,
    loss_function,
)
from raytrain_adv.run.run import Run
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.transform import Plan
from raytrain_adv.worker.trials.attention import try_attention


def fetch(job: JobConfig, facts: HardwareFacts, say: Callable[[str], None]) -> None:
    """Copy what transforms and attention need on the workers into output_dir; if there is a driver,
    it has already done so. Raises JobError when it is not available.
    """
    Transforms(job).fetch(facts, say)
    attention.fetch(job, facts, say)


def install(
    run: Run, transforms: Transforms, model: PreTrainedModel, plans: Mapping[str, Plan]
) -> dict[str, Plan]:
    """Replace the planned forward passes; return the plans with the results of their trials. Raises
    JobError when a replacement turns out to be wrong; TrainingError when ranks would compute with
    different replacements.
    """
    found = transforms.install(model, plans, run.device, compute_dtype(transforms.job))
    require_alike(run, found)
    return found


def check_attention(job: JobConfig, run: Run, model: PreTrainedModel) -> dict[str, str | None]:
    """Test the model's attention in a trial; return its name and the result for the report. Raises
    JobError when it does not compute the model's attention.
    """
    name = attention.attention_name(job, model)
    result = try_attention(job, model, run.device, compute_dtype(job))
    if result:
        run.say(f"attention {name}: {result}", event="attention")
    return {"attention": name, "attention_trial": result or None}


def training_loss(job: JobConfig, run: Run, model: PreTrainedModel) -> LossFunction | None:
    """Return the loss of a job whose loss is not the plain one; a reference is loaded."""
    train, compiled = job.train, job.parallel.torch_compile
    if train.use_dft_loss:
        return loss_function(model, compiled, dft_sum)
    if train.use_eaft_loss:
        return loss_function(model, compiled, eaft_sum(train.eaft_alpha))
    if not train.compares_with_reference:
        return None
    with run.phase("reference model"):
        reference = load_reference(job, run.device)
    if train.use_asft_loss:
        return asft_loss(reference, train.asft_alpha)
    ours, theirs = (m.config.get_text_config().vocab_size for m in (model, reference))
    if ours != theirs:
        raise JobError(
            "The teacher has other tokens than the model",
            f"{theirs} of {train.distill_model_name_or_path}, {ours} of the model",
            "name a teacher of the same family by distill_model_name_or_path",
        )
    return distill_loss(reference, train.distill_alpha)


def load_reference(job: JobConfig, device: torch.device) -> PreTrainedModel:
    """Return the frozen model that the loss compares with: a teacher, or the model before training,
    without the job's features.
    """
    if (teacher := job.train.distill_model_name_or_path) is not None:
        named = {"model_name_or_path": teacher, "train_from_scratch": False}
        job = dataclasses.replace(job, model=job.model.model_copy(update=named))
    reference = build(job)
    reference.requires_grad_(False)
    parallel.shard(reference, job, parallel.build_mesh(job, device))
    weights.materialize(reference, device, parallel.parameter_device(job))
    weights.load_pretrained(reference, job, device)
    reference.train(False)
    return reference


def require_alike(run: Run, plans: Mapping[str, Plan]) -> None:
    """Compare which modules were changed, and to what, between all ranks. Raises TrainingError on
    all ranks, when one differs.
    """
    mine = {
        name: {fqn: change.after for fqn, change in plan.changes.items()}
        for name, plan in plans.items()
    }
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).digest()
    number = int.from_bytes(digest[:7], "big")
    if run.agree(number, dist.ReduceOp.MIN) != run.agree(number, dist.ReduceOp.MAX):
        raise TrainingError(
            "Workers would compute differently: transforms changed other modules on some ranks",
            f"rank {run.rank}: {', '.join(f'{n} {len(m)} modules' for n, m in mine.items())}",
            "give all nodes the same versions and the same files",
        )
