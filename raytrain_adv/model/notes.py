"""What a user should know about how a checkpoint is read and written, in sentences."""

from collections.abc import Iterator

from transformers import PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.model.build import raw_config
from raytrain_adv.model.towers import tower_notes
from raytrain_adv.ops.stored import formats


def model_notes(job: JobConfig, model: PreTrainedModel) -> tuple[str, ...]:
    """Return the sentences for the plan and the report."""
    return tuple(_notes(job, model))


def _notes(job: JobConfig, model: PreTrainedModel) -> Iterator[str]:
    if not job.model.train_from_scratch:
        yield from formats.describe(raw_config(job))
    yield from tower_notes(model)
