"""The same job without a feature, run first where a key asks for it: what the feature is measured
by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from raytrain_adv.config.job import JobConfig
from raytrain_adv.transforms.applied import enabled
from raytrain_adv.transforms.fp8 import Fp8


def twins(job: JobConfig) -> Iterator[JobConfig]:
    """Yield the jobs to run before this one; each has an output_dir of its own beside this job's.

    One that has run to its end is not run again, one that was interrupted goes on.
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
                "export_model": True,  # what this run will be measured by
                "num_sample_answers": 0,
            }
        )
        # It is called the bf16 twin: FP8 is off in it too.
        off = (transform, job.transform(Fp8))
        others = tuple(t.without() if t in off else t for t in job.transforms)
        yield replace(job, output=output, transforms=others)


def beside_its_twin(job: JobConfig) -> JobConfig:
    """Return the job with its twin as the run that its report puts beside it, unless it names
    another.
    """
    folders = [t.twin_dir(job.output.output_dir) for t in enabled(job)]
    twin = next((folder for folder in folders if folder is not None), None)
    if twin is None or job.output.compare_with is not None:
        return job
    return replace(job, output=job.output.model_copy(update={"compare_with": twin}))
