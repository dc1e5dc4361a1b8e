"""The same job without a feature, run first if a key enables it, to measure the feature against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from raytrain_adv.config.job import JobConfig
from raytrain_adv.transforms.applied import enabled
from raytrain_adv.transforms.fp8 import Fp8


def twins(job: JobConfig) -> Iterator[JobConfig]:
    """Yield the jobs to run before this one; each has an output_dir next to this job's.

    A finished one is not run again, an interrupted one continues.
    """
    for transform in enabled(job):
        folder = transform.twin_dir(job.output.output_dir)
        if folder is None:
            continue
        output = job.output.model_copy(
            update={
                "output_dir": folder,
                "resume_from_checkpoint": None if job.output.overwrite_output_dir else True,
                "compare_with": None,
                "export_model": True,  # this run is measured against it
                "num_sample_answers": 0,
            }
        )
        # It is called the bf16 twin: FP8 is off in it too.
        off = (transform, job.transform(Fp8))
        others = tuple(t.without() if t in off else t for t in job.transforms)
        yield replace(job, output=output, transforms=others)


def measure_against_twin(job: JobConfig) -> JobConfig:
    """Return the job with compare_with set to its twin's folder, unless it names another run."""
    folders = [t.twin_dir(job.output.output_dir) for t in enabled(job)]
    twin = next((folder for folder in folders if folder is not None), None)
    if twin is None or job.output.compare_with is not None:
        return job
    return replace(job, output=job.output.model_copy(update={"compare_with": twin}))
