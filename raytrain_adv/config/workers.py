"""A number of workers that may change during the run, while the batch of a step may not."""

from __future__ import annotations

from raytrain_adv.config.job import JobConfig

CPU_WORKERS = 2
"""Workers for ray_num_workers: auto on a cluster without GPUs."""


def num_passes(job: JobConfig, workers: int) -> int:
    """Return the forward and backward passes that all workers together make in an optimizer step.

    Args:
        job: the job; where its number of workers may change, the most it may have decide.
        workers: how many there are.
    """
    most = workers if job.ray.ends is None else job.ray.ends[1]
    return job.train.gradient_accumulation_steps * most


def accumulation(job: JobConfig, workers: int) -> int:
    """Return the passes that each worker makes in a step, rounded down where they cannot be shared
    equally.
    """
    return num_passes(job, workers) // workers


def sharing(job: JobConfig, most: int) -> tuple[int, ...]:
    """Return the numbers of workers up to `most` that can share the passes of a step equally, in
    groups that hold the model.
    """
    group = job.parallel.fsdp_shard_size or 1
    return tuple(n for n in range(1, most + 1) if num_passes(job, n) % n == 0 and n % group == 0)


def numbers(job: JobConfig) -> tuple[int, ...]:
    """Return the numbers of workers that the run may have, ascending; none where it has one number
    throughout.
    """
    if job.ray.ends is None:
        return ()
    fewest, most = job.ray.ends
    return tuple(n for n in sharing(job, most) if n >= fewest)
