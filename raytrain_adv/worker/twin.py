"""The same job without a feature, trained beforehand: what it reached, measured in this run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.model.adapter import load_adapter
from raytrain_adv.model.weights import load_pretrained
from raytrain_adv.run.run import Run
from raytrain_adv.transforms.applied import enabled
from raytrain_adv.transforms.lora import Lora
from raytrain_adv.worker.loop import Loop


def measure_twin(job: JobConfig, run: Run, model: PreTrainedModel, loop: Loop) -> None:
    """Evaluate the twins that transforms have had trained, in this run's model, whose own weights
    are lost by it: it has been exported.
    """
    for transform in enabled(job):
        folder = transform.twin_dir(job.output.output_dir)
        if folder is None or loop.held_out is None:
            continue
        with run.phase("twin"):
            load_trained(job, run, model, Path(folder) / "model")
            loop.evaluate_variants(loop.arithmetic.total_steps, of="twin")


def load_trained(job: JobConfig, run: Run, model: PreTrainedModel, folder: Path) -> None:
    """Read the model that a run of the same kind has exported into the shards of this one."""
    if job.transform(Lora).enabled:
        load_adapter(model, folder)
        return
    source = {"model_name_or_path": str(folder), "train_from_scratch": False}
    twin = replace(job, model=job.model.model_copy(update=source))
    load_pretrained(model, twin, run.device)
