"""How an elastic number of workers shares the constant batch of a step."""

from __future__ import annotations

from raytrain_adv.config.job import JobConfig

CPU_WORKERS = 2
"""Workers for ray_num_workers: auto on a cluster without GPUs."""


def num_passes(job: JobConfig, workers: int) -> int:
    """Return the forward and backward passes that all workers together make in an optimizer step.

    Args:
        job: the job; if it is elastic, its largest number of workers decides.
        workers: their number.
    """
    most = workers if job.ray.ends is None else job.ray.ends[1]
    return job.train.gradient_accumulation_steps * most


def accumulation(job: JobConfig, workers: int) -> int:
    """Return the passes of each worker in a step, rounded down if they cannot be shared equally."""
    return num_passes(job, workers) // workers


def sharing(job: JobConfig, most: int) -> tuple[int, ...]:
    """Return the numbers of workers up to `most` that share a step's passes equally and that
    fsdp_shard_size divides.
    """
    group = job.parallel.fsdp_shard_size or 1
    return tuple(n for n in range(1, most + 1) if num_passes(job, n) % n == 0 and n % group == 0)


def numbers(job: JobConfig) -> tuple[int, ...]:
    """Return the numbers of workers that an elastic run may have, ascending; else nothing."""
    if job.ray.ends is None:
        return ()
    fewest, most = job.ray.ends
    return tuple(n for n in sharing(job, most) if n >= fewest)
