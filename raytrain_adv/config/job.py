"""A loaded job: every key resolved and frozen."""

import hashlib
import importlib
import json
import math
import os
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from raytrain_adv.config.hub import HubConfig
from raytrain_adv.config.section import Section
from raytrain_adv.config.sections import (
    DataConfig,
    ModelConfig,
    OutputConfig,
    ParallelConfig,
    RayConfig,
)
from raytrain_adv.config.sweep import Sweep
from raytrain_adv.config.training import TrainConfig
from raytrain_adv.errors import JobError

CPU_WORKERS = 2
"""Workers for ray_num_workers: auto on a cluster without GPUs."""
SectionType = TypeVar("SectionType", bound=Section)

# Keys that may change when a run continues, because they do not change what is computed. Batch
# size, accumulation and workers may change if their product does not; the checkpoint checks that.
FREE_TO_CHANGE = frozenset([
    "output_dir", "overwrite_output_dir", "logging_steps", "save_steps", "save_strategy",
    "save_total_limit", "eval_strategy", "eval_steps", "eval_on_start", "eval_on_each_dataset",
    "compute_accuracy", "load_best_model_at_end", "metric_for_best_model", "early_stopping_steps",
    "resume_from_checkpoint", "report_to", "delete_previous_run",
    "run_name", "plot_loss", "compare_with", "compare", "export_model", "num_sample_answers",
    "ray_num_workers", "resources_per_worker", "placement_strategy", "ray_storage_path",
    "ray_run_name", "ray_init_kwargs", "max_failures", "step_timeout", "on_bad_loss",
    "bad_loss_factor", "force", "preprocessing_num_workers", "overwrite_cache",
    "tokenized_path", "cache_dir", "push_to_hub", "hub_model_id", "hub_private_repo",
    "hub_strategy", "hub_revision", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "fsdp_shard_size", "fsdp_reshard_after_forward",
    "sequence_parallel_size",
    "fsdp_cpu_offload", "ddp_timeout", "gradient_checkpointing", "activation_offloading",
    "disable_gradient_checkpointing", "dataset_dir",
])  # fmt: skip


@dataclass(frozen=True, repr=False)
class JobConfig:
    """A resolved job. Sections have flat keys; each transform is a section."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    parallel: ParallelConfig
    output: OutputConfig
    ray: RayConfig
    hub: HubConfig = field(default_factory=HubConfig)
    transforms: tuple[Section, ...] = ()
    """Every transform, enabled or not, in the order of application."""
    source: str = ""
    """The job file's path, for messages."""
    notes: tuple[str, ...] = ()
    """For the user: keys without effect, and why."""
    sweep: Sweep | None = None
    """The trials, if the job file has a sweep section; this job is then the first of them."""

    def __repr__(self) -> str:
        """Omit the keys, which may contain secrets: Ray's dashboard shows this text."""
        return f"JobConfig({self.source!r})"

    @property
    def run_name(self) -> str:
        """The run's name in Ray, and its folder's name below ray_storage_path."""
        folder = os.path.abspath(self.output.output_dir)  # "." has no name
        return self.ray.ray_run_name or os.path.basename(folder)

    @property
    def packs(self) -> bool:
        """Whether rows share sequences: in pretraining, too, unless packing is given."""
        data = self.data
        pretrains = self.train.stage == "pt" and "packing" not in data.model_fields_set
        return data.packing or data.neat_packing or pretrains

    def sections(self) -> tuple[Section, ...]:
        """Return the sections, then the transforms."""
        return (*(getattr(self, name) for name in SECTIONS), *self.transforms)

    def given(self) -> dict[str, Any]:
        """Return the keys from the file and the command line, with their values as JSON types."""
        return self.flat(exclude_unset=True)

    def transform(self, kind: type[SectionType]) -> SectionType:
        """Return this job's transform of the given type."""
        return next(t for t in self.transforms if isinstance(t, kind))

    def flat(self, exclude_unset: bool = False) -> dict[str, Any]:
        """Return every key, or every given one, with its resolved value as JSON types."""
        dumps = (s.model_dump(mode="json", exclude_unset=exclude_unset) for s in self.sections())
        return {key: value for dump in dumps for key, value in dump.items()}

    def fingerprint(self) -> str:
        """Return a hash of the keys that change what is computed; a continued run has the same."""
        keys = {k: v for k, v in self.flat().items() if k not in FREE_TO_CHANGE}
        return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, other: dict[str, Any], free: frozenset[str] = frozenset()) -> list[str]:
        """Return a line for each key, not in `free`, that differs and changes what is computed."""
        mine = self.flat()
        return [
            f"{key}: {other.get(key)!r} then, {mine.get(key)!r} now"
            for key in sorted(mine.keys() | other.keys())
            if key not in FREE_TO_CHANGE | free and mine.get(key) != other.get(key)
        ]


SECTIONS: dict[str, type[Section]] = {
    field.name: field.type
    for field in fields(JobConfig)
    if isinstance(field.type, type) and issubclass(field.type, Section)
}
"""JobConfig's field -> its section."""


def transform_types() -> tuple[type[Section], ...]:
    """Return every transform, in the order of application.

    Imported by name, because transforms import config and config must not import transforms.
    """
    found: tuple[type[Section], ...] = importlib.import_module("raytrain_adv.transforms").discover()
    return found


def section_types() -> tuple[type[Section], ...]:
    """Return the sections and the transforms."""
    return (*SECTIONS.values(), *transform_types())


def num_passes(job: JobConfig, workers: int) -> int:
    """Return the passes of an optimizer step, those of workers that share a sequence counted once;
    the most of an elastic job decide.
    """
    most = workers if job.ray.ends is None else job.ray.ends[1]
    return job.train.gradient_accumulation_steps * most // job.parallel.sequence_parallel_size


def accumulation(job: JobConfig, workers: int) -> int:
    """Return the passes of each worker in a step, rounded down if they cannot be shared equally."""
    return num_passes(job, workers) * job.parallel.sequence_parallel_size // workers


def sharing(job: JobConfig, most: int) -> tuple[int, ...]:
    """Return the numbers of workers up to `most` that share a step's passes, fill shards, and split
    sequences.
    """
    split = job.parallel.sequence_parallel_size
    group = math.lcm(job.parallel.fsdp_shard_size or 1, split)
    return tuple(n for n in range(group, most + 1, group) if num_passes(job, n) % (n // split) == 0)


def numbers(job: JobConfig) -> tuple[int, ...]:
    """Return the numbers of workers that an elastic run may have, ascending; else nothing."""
    fewest, most = job.ray.ends or (1, 0)
    return tuple(n for n in sharing(job, most) if n >= fewest)


def refuse_without_graph(job: JobConfig, reason: str) -> None:
    """Raise JobError if the job requires a graph and there is a reason against one."""
    if reason and job.parallel.cuda_graph:
        raise JobError(
            "cuda_graph: true, but passes cannot be recorded",
            reason,
            "delete cuda_graph, which records passes where it can",
        )
