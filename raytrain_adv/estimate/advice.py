"""Changes that make a job fit its GPUs or use them better, each verified by a new prediction."""

from __future__ import annotations

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
from raytrain_adv.transforms.lora import Lora

MOST_WORKERS = 1024
FASTER = {
    "full": (
        ("none", "faster: nothing is recomputed"),
        ("selective", "faster: less is recomputed"),
    ),
    "selective": (("none", "faster: nothing is recomputed"),),
    "none": (),
}


@dataclass(frozen=True)
class Gpu:
    """A GPU to compare a prediction with."""

    name: str
    memory_gib: float
    """As PyTorch reports it."""
    is_known: bool = False
    """Whether it is the job's own GPU, not an example."""


PURE_BF16 = "half the bytes a parameter; updates below 0.2 % of a weight are lost to rounding"
EXAMPLES = (Gpu("H100 80 GB", 79.1), Gpu("H200 141 GB", 139.8))


@dataclass(frozen=True)
class Advice:
    """A change to the job, and the memory it then needs."""

    keys: Mapping[str, Any]
    """The keys to change, with their new values."""
    total: float
    """Predicted peak in GiB with the change."""
    why: str

    def sentence(self) -> str:
        """Return the change as in a job file, and its effect."""
        changes = ", ".join(f"{key}: {written(value)}" for key, value in self.keys.items())
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

    def with_keys(self, keys: Mapping[str, Any]) -> Case:
        """Return the case with keys of the job changed."""
        model = self.model
        if keys.get("pure_bf16"):
            model = copy.deepcopy(model)
            nn.Module.to(model, torch.bfloat16)
        value = keys.get("ray_num_workers", self.world_size)
        workers = int(min(value) if isinstance(value, list) else value)
        return Case(with_keys(self.job, keys), model, workers, self.seq_len)


def with_keys(job: JobConfig, keys: Mapping[str, Any]) -> JobConfig:
    """Return the job with keys changed; it is not validated again."""
    sections = {}
    for field in ("model", "data", "train", "parallel", "output", "ray"):
        section = getattr(job, field)
        own = {k: v for k, v in keys.items() if k in type(section).model_fields}
        sections[field] = section.model_copy(update=own)
    return dataclasses.replace(job, **sections)


def advise(case: Case, gpu: Gpu) -> list[Advice]:
    """Return changes for a GPU: faster ones if there is room, else smaller ones."""
    prediction = case.prediction()
    if prediction.fits(gpu.memory_gib):
        return _faster(case, gpu)
    return _smaller(case, gpu, prediction.total)


def _faster(case: Case, gpu: Gpu) -> list[Advice]:
    """Return the first way to recompute less in backward that still fits."""
    for mode, why in FASTER[checkpointing_mode(case.job)]:
        keys = _checkpointing(case.job, mode)
        total = _total(case, keys)
        if total <= gpu.memory_gib * 0.9:
            return [Advice(keys, total, why)]
    return []


def _smaller(case: Case, gpu: Gpu, total: float) -> list[Advice]:
    """Return the single changes that make it fit, or else a combination that does."""
    changes = list(_savings(case))
    changed = [Advice(keys, _total(case, keys), why) for keys, why in changes]
    fitting = [a for a in changed if _fits(a.total, gpu)]
    if not fitting:
        fitting = _combined(case, gpu, [a for a in changed if a.total < total * 0.99])
    workers = _more_workers(case, gpu)
    return fitting[:4] + ([workers] if workers else [])


def _savings(case: Case) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield changes that save memory, the cheapest first."""
    job, train = case.job, case.job.train
    if not job.parallel.torch_compile:
        yield {"torch_compile": True}, "compiled layers keep less"
    if checkpointing_mode(job) == "none":
        yield _checkpointing(job, "selective"), "recomputes element-wise results"
    if checkpointing_mode(job) != "full":
        yield _checkpointing(job, "full"), "recomputes every layer"
    if train.per_device_train_batch_size > 1:
        yield _split_batch(case), "the same batch in more passes"
    if train.optim != "adamw_torch_8bit":
        yield {"optim": "adamw_torch_8bit"}, "8-bit optimizer states"
    if train.bf16 and not train.pure_bf16 and not job.transform(Lora).enabled:
        yield {"bf16": False, "pure_bf16": True}, PURE_BF16
    if not job.parallel.fsdp_cpu_offload:
        yield {"fsdp_cpu_offload": True}, "much slower: states are in host memory"


def _checkpointing(job: JobConfig, mode: str) -> dict[str, Any]:
    """Return the keys that set activation checkpointing, using the job's own keys."""
    if mode == "none" and job.parallel.gradient_checkpointing is None:
        return {"disable_gradient_checkpointing": True}
    if job.parallel.disable_gradient_checkpointing:
        return {"disable_gradient_checkpointing": False, "gradient_checkpointing": mode}
    return {"gradient_checkpointing": mode}


def _split_batch(case: Case) -> dict[str, Any]:
    train = case.job.train
    rows = train.per_device_train_batch_size
    return {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": train.gradient_accumulation_steps * rows,
    }


def _combined(case: Case, gpu: Gpu, helping: list[Advice]) -> list[Advice]:
    """Add one change after the other until the job fits; return that combination, if any."""
    keys: dict[str, Any] = {}
    for advice in helping:
        keys.update(advice.keys)
        total = _total(case, keys)
        if _fits(total, gpu):
            return [Advice(dict(keys), total, "together")]
    return []


def _more_workers(case: Case, gpu: Gpu) -> Advice | None:
    if case.job.ray.ends is not None:
        return _more_at_least(case, gpu)
    workers = case.world_size * 2
    while workers <= MOST_WORKERS:
        keys = {"ray_num_workers": workers}
        total = _total(case, keys)
        if _fits(total, gpu):
            return Advice(keys, total, "smaller shards; the batch per step grows with the workers")
        workers *= 2
    return None


def _more_at_least(case: Case, gpu: Gpu) -> Advice | None:
    """Return the smallest minimum number of workers with which it fits."""
    for workers in numbers(case.job):
        smaller = dataclasses.replace(case, world_size=workers)
        if workers > case.world_size and _fits(smaller.prediction().total, gpu):
            keys = {"ray_num_workers": [workers, numbers(case.job)[-1]]}
            return Advice(keys, smaller.prediction().total, "never fewer, with larger shards")
    return None


def _total(case: Case, keys: Mapping[str, Any]) -> float:
    return case.with_keys(keys).prediction().total


def _fits(total: float, gpu: Gpu) -> bool:
    return total <= gpu.memory_gib * (1 - RESERVE)


def written(value: Any) -> str:
    """Return a value as in YAML, on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        items = ", ".join(map(written, value))
        return f"[{items}]" if all(isinstance(one, int) for one in value) else items
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
