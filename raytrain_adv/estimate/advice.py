"""Changes that make a job fit its GPUs or use them better, each verified by a new prediction."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from raytrain_adv.config.job import JobConfig, numbers
from raytrain_adv.estimate.memory import RESERVE, MemoryPrediction, predict
from raytrain_adv.model.parallel import checkpointing_mode
from raytrain_adv.text import as_yaml
from raytrain_adv.transforms.lora import Lora

MOST_WORKERS = 1024
NONE = ("none", "faster: nothing is recomputed")
FASTER = {"full": (NONE, ("selective", "faster: less is recomputed")), "selective": (NONE,)}
"""Checkpointing mode -> faster ones."""


@dataclass(frozen=True)
class Gpu:
    """A GPU to compare a prediction with."""

    name: str
    memory_gib: float  # as PyTorch reports it


PURE_BF16 = "half the bytes a parameter; updates below 0.2 % of a weight are lost to rounding"
EXAMPLES = (Gpu("H100 80 GB", 79.1), Gpu("H200 141 GB", 139.8))


@dataclass(frozen=True)
class Advice:
    """A change to the job, and the memory it then needs."""

    keys: Mapping[str, Any]
    total: float  # predicted peak in GiB with the change
    why: str

    def sentence(self) -> str:
        """Return the change as in a job file, and its effect."""
        changes = ", ".join(f"{key}: {as_yaml(value)}" for key, value in self.keys.items())
        return f"{changes}  ->  {self.total:.1f} GiB ({self.why})"


@dataclass(frozen=True)
class Case:
    """A job, its model after the transforms, and the size of a forward pass."""

    job: JobConfig
    model: PreTrainedModel
    world_size: int
    seq_len: int

    def prediction(self) -> MemoryPrediction:
        """Predict this case's memory."""
        batch = self.job.train.per_device_train_batch_size
        return predict(self.model, self.job, self.world_size, self.seq_len, batch)

    def with_keys(self, keys: Mapping[str, Any]) -> "Case":
        """Return the case with keys of the job changed; they are not validated again."""
        model, job = self.model, self.job
        if keys.get("pure_bf16"):
            model = copy.deepcopy(model)
            nn.Module.to(model, torch.bfloat16)
        for name in ("model", "data", "train", "parallel", "output", "ray"):
            section = getattr(job, name)
            own = {k: v for k, v in keys.items() if k in type(section).model_fields}
            job = dataclasses.replace(job, **{name: section.model_copy(update=own)})
        value = keys.get("ray_num_workers", self.world_size)
        workers = int(min(value) if isinstance(value, list) else value)
        return Case(job, model, workers, self.seq_len)

    def total(self, keys: Mapping[str, Any]) -> float:
        """Predict the peak in GiB with keys of the job changed."""
        return self.with_keys(keys).prediction().total


def advise(case: Case, gpu: Gpu) -> list[Advice]:
    """Return changes for a GPU: faster ones if there is room, else smaller ones."""
    prediction = case.prediction()
    if not prediction.fits(gpu.memory_gib):
        return _smaller(case, gpu, prediction.total)
    for mode, why in FASTER.get(checkpointing_mode(case.job), ()):
        keys = _checkpointing(case.job, mode)
        total = case.total(keys)
        if total <= gpu.memory_gib * 0.9:
            return [Advice(keys, total, why)]
    return []


def _smaller(case: Case, gpu: Gpu, total: float) -> list[Advice]:
    changed = [Advice(keys, case.total(keys), why) for keys, why in _savings(case)]
    fitting = [a for a in changed if _fits(a.total, gpu)]
    if not fitting:
        fitting = _combined(case, gpu, [a for a in changed if a.total < total * 0.99])
    return [*fitting[:4], *_more_workers(case, gpu)]


def _savings(case: Case) -> Iterator[tuple[dict[str, Any], str]]:
    job, train = case.job, case.job.train
    rows = train.per_device_train_batch_size
    if not job.parallel.torch_compile:
        yield {"torch_compile": True}, "compiled layers keep less"
    if checkpointing_mode(job) == "none":
        yield _checkpointing(job, "selective"), "recomputes element-wise results"
    if checkpointing_mode(job) != "full":
        yield _checkpointing(job, "full"), "recomputes every layer"
    if rows > 1:
        passes = train.gradient_accumulation_steps * rows
        split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": passes}
        yield split, "the same batch in more passes"
    if train.optim != "adamw_torch_8bit":
        yield {"optim": "adamw_torch_8bit"}, "8-bit optimizer states"
    if train.bf16 and not train.pure_bf16 and not job.transform(Lora).enabled:
        yield {"bf16": False, "pure_bf16": True}, PURE_BF16
    if not job.parallel.fsdp_cpu_offload:
        yield {"fsdp_cpu_offload": True}, "much slower: states are in host memory"


def _checkpointing(job: JobConfig, mode: str) -> dict[str, Any]:
    if mode == "none" and job.parallel.gradient_checkpointing is None:
        return {"disable_gradient_checkpointing": True}
    if job.parallel.disable_gradient_checkpointing:
        return {"disable_gradient_checkpointing": False, "gradient_checkpointing": mode}
    return {"gradient_checkpointing": mode}


def _combined(case: Case, gpu: Gpu, helping: list[Advice]) -> list[Advice]:
    """Add one change after the other until the job fits; return that combination, if any."""
    keys: dict[str, Any] = {}
    for advice in helping:
        keys.update(advice.keys)
        if _fits(total := case.total(keys), gpu):
            return [Advice(keys, total, "together")]
    return []


def _more_workers(case: Case, gpu: Gpu) -> list[Advice]:
    """Return the smallest number of workers, or minimum number, with which it fits, if any."""
    doubled: list[Any] = [case.world_size * 2**n for n in range(1, MOST_WORKERS.bit_length())]
    choices = [n for n in doubled if n <= MOST_WORKERS]
    why = "smaller shards; the batch per step grows with the workers"
    if case.job.ray.ends is not None:
        several = numbers(case.job)
        choices = [[n, several[-1]] for n in several if n > case.world_size]
        why = "never fewer, with larger shards"
    for workers in choices:
        keys = {"ray_num_workers": workers}
        if _fits(total := case.total(keys), gpu):
            return [Advice(keys, total, why)]
    return []


def _fits(total: float, gpu: Gpu) -> bool:
    return total <= gpu.memory_gib * (1 - RESERVE)
