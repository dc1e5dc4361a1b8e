"""What a user should know about how a checkpoint is read and written, in sentences."""

import re
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.model.config_file import raw_config, read_config
from raytrain_adv.model.towers import is_multimodal, tower_notes
from raytrain_adv.model.vocabulary import describe
from raytrain_adv.ops.stored import formats
from raytrain_adv.text import listed, plural
from raytrain_adv.transforms.vocabulary import Vocabulary


def model_notes(job: JobConfig, model: PreTrainedModel) -> tuple[str, ...]:
    """Return the sentences for the plan and the report."""
    return tuple(_notes(job, model))


def cpu_notes(job: JobConfig, device_type: str) -> Iterator[str]:
    """Yield what makes a run slow on this machine's CPU, if it computes there."""
    lacks = torch.backends.cpu.get_cpu_capability() == "AVX2"
    if device_type == "cpu" and job.train.computes_in_bf16 and lacks:
        yield "bf16: this CPU lacks AVX-512 and is much faster in float32 (bf16: false)"


def _notes(job: JobConfig, model: PreTrainedModel) -> Iterator[str]:
    if not job.model.train_from_scratch:
        yield from formats.describe(raw_config(job))
    yield from tower_notes(model)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    if frozen and job.train.freeze_trainable_layers is None and not is_multimodal(model):
        named = listed(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in frozen}))
        count = plural(len(frozen), "tensor")
        yield f"no gradient reaches {count}, which stay as they are: {named}"
    if job.transform(Vocabulary).resize_vocab:
        yield describe(job, model, int(read_config(job).get_text_config().vocab_size))
