"""The same job without a feature, trained first if a key requests it: what the feature is measured
by.
"""

from __future__ import annotations

from dataclasses import replace

from raytrain_adv.config.job import JobConfig
from raytrain_adv.transforms.applied import Transforms


def beside_its_twin(job: JobConfig) -> JobConfig:
    """Return the job with its twin as the run that its report is compared with, unless it names
    another.
    """
    twin = next(Transforms(job).twins(), None)
    if twin is None or job.output.compare_with is not None:
        return job
    compare_with = twin.output.output_dir
    return replace(job, output=job.output.model_copy(update={"compare_with": compare_with}))
