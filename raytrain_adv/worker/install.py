"""What transforms bring along and put in place on workers, the same on every rank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial

import torch.distributed as dist
from transformers import PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.errors import RaytrainAdvError, TrainingError
from raytrain_adv.hardware import HardwareFacts
from raytrain_adv.model import attention
from raytrain_adv.model.parallel import compute_dtype
from raytrain_adv.run.run import Run
from raytrain_adv.transforms.applied import fetch_all, install_all, probe_all
from raytrain_adv.transforms.transform import Plan
from raytrain_adv.worker.trials.attention import try_attention


def fetch(job: JobConfig, facts: HardwareFacts, say: Callable[[str], None]) -> None:
    """Bring what transforms and attention need on the workers into output_dir.

    Raises:
        JobError: when it cannot be had.
    """
    fetch_all(job, facts, say)
    attention.fetch(job, facts, say)


def fetched(job: JobConfig, run: Run, facts: HardwareFacts) -> None:
    """Have rank 0 put into output_dir what transforms need; the driver has done it where there is
    one.

    Raises:
        RaytrainAdvError: rank 0's, on all ranks.
    """
    refused: RaytrainAdvError | None = None
    if run.is_main:
        try:
            fetch(job, facts, partial(run.say, event="fetch"))
        except RaytrainAdvError as error:
            refused = error
    refused = run.broadcast(refused)
    if refused is not None:
        raise refused


def installed(
    job: JobConfig, run: Run, model: PreTrainedModel, plans: Mapping[str, Plan]
) -> dict[str, Plan]:
    """Replace the forward passes that were planned; return the plans with what was found.

    Raises:
        JobError: when a replacement turns out to be wrong.
        TrainingError: when ranks would compute with different replacements.
    """
    device, dtype = run.device, compute_dtype(job)
    found = probe_all(job, model, install_all(job, model, plans, device, dtype), device, dtype)
    require_alike(run, found)
    return found


def attended(job: JobConfig, run: Run, model: PreTrainedModel) -> dict[str, str | None]:
    """Try the model's attention out; return what computes it and what was found, for the report.

    Raises:
        JobError: when it is not the attention that the model asks for.
    """
    name = attention.attention_name(job, model)
    tried = try_attention(job, model, run.device, compute_dtype(job))
    if tried:
        run.say(f"attention {name}: {tried}", event="attention")
    return {"attention": name, "attention_trial": tried or None}


def require_alike(run: Run, plans: Mapping[str, Plan]) -> None:
    """Compare what was changed, and into what, between all ranks.

    Raises:
        TrainingError: on all ranks, when one differs.
    """
    mine = {
        name: {fqn: change.after for fqn, change in plan.changes.items()}
        for name, plan in plans.items()
    }
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).digest()
    number = int.from_bytes(digest[:7], "big")
    if run.agree(number, dist.ReduceOp.MIN) != run.agree(number, dist.ReduceOp.MAX):
        raise TrainingError(
            "Workers would not compute alike: transforms changed other modules on some ranks",
            f"rank {run.rank}: {', '.join(f'{n} {len(m)} modules' for n, m in mine.items())}",
            "give all nodes the same versions and the same files",
        )
