"""What a plan leaves unsaid in its figures: keys without effect, and what was not looked at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from raytrain_adv.config.job import JobConfig
from raytrain_adv.driver.output.output_dir import decided
from raytrain_adv.errors import ClusterError, JobError, StorageError
from raytrain_adv.hardware import HardwareFacts
from raytrain_adv.text import plural
from raytrain_adv.transforms.applied import Transforms


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
        *_output(job),
        *_gpus(job, world_size, facts),
        *_refusals(job, facts),
        f"no cluster was asked whether it can run this: {preflight} does",
    )


def _checkpoint(job: JobConfig) -> Iterator[str]:
    path = job.output.resume_from_checkpoint
    if isinstance(path, str) and "://" not in path and not Path(path).is_dir():
        yield f"resume_from_checkpoint: there is no folder {path} on this machine"


def _output(job: JobConfig) -> Iterator[str]:
    """Say what becomes of a run that is in output_dir. Buckets are not asked for a plan."""
    if job.sweep is not None or "://" in (job.ray.ray_storage_path or ""):
        return
    try:
        found = decided(job)
    except (JobError, StorageError) as error:
        yield f"as output_dir stands, a launch is refused: {error.what} ({job.output.output_dir})"
        return
    if found.replaced.is_there:
        yield f"a launch deletes the run in {found.folder} (overwrite_output_dir: true)"
    elif found.finished:
        yield f"a launch does nothing: this job has run to its end in {found.folder}"


def _refusals(job: JobConfig, facts: HardwareFacts) -> Iterator[str]:
    for transform in Transforms(job):
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
