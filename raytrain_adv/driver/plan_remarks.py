"""What a plan leaves unsaid in its figures: keys without effect, and what was not looked at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from raytrain_adv.config.job import JobConfig
from raytrain_adv.errors import ClusterError
from raytrain_adv.hardware import HardwareFacts
from raytrain_adv.report.numbers import plural
from raytrain_adv.transforms.apply import enabled


def remarks(job: JobConfig, world_size: int, facts: HardwareFacts) -> tuple[str, ...]:
    """Return the sentences below a plan.

    Args:
        job: the loaded job.
        world_size: workers that the plan is for.
        facts: the machine that the plan is made on.
    """
    preflight = f"raytrain-adv preflight {job.source}".rstrip()
    return (
        *job.notes,
        *_checkpoint(job),
        *_gpus(job, world_size, facts),
        *_refusals(job, facts),
        f"no cluster was asked whether it can run this: {preflight} does",
    )


def _checkpoint(job: JobConfig) -> Iterator[str]:
    path = job.output.resume_from_checkpoint
    if isinstance(path, str) and "://" not in path and not Path(path).is_dir():
        yield f"resume_from_checkpoint: there is no folder {path} on this machine"


def _refusals(job: JobConfig, facts: HardwareFacts) -> Iterator[str]:
    for transform in enabled(job):
        try:
            transform.check(facts)
        except ClusterError as error:
            yield f"not on this machine: {error.what}"


def _gpus(job: JobConfig, world_size: int, facts: HardwareFacts) -> Iterator[str]:
    if job.parallel.use_cpu:
        return
    if facts.device_type != "cuda":
        yield (
            "this machine has no GPU, and the plan is for GPUs: a Ray that is started here would "
            "train on the CPU; use_cpu: true plans for that"
        )
    elif facts.num_gpus < world_size:
        yield f"this machine has {plural(facts.num_gpus, 'GPU')} for {world_size:,} workers"
