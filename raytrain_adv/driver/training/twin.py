"""The same job without a feature, run first if a key enables it, to measure the feature against."""

from __future__ import annotations

from dataclasses import replace

from raytrain_adv.config.job import JobConfig
from raytrain_adv.transforms.applied import Transforms


def measure_against_twin(job: JobConfig) -> JobConfig:
    """Return the job with compare_with set to its twin's folder, unless it names another run."""
    twin = next(Transforms(job).twins(), None)
    if twin is None or job.output.compare_with is not None:
        return job
    compare_with = twin.output.output_dir
    return replace(job, output=job.output.model_copy(update={"compare_with": compare_with}))
