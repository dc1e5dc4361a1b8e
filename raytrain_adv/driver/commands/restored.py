"""The model of one of a run's checkpoints, in host memory, in one process without Ray."""

import warnings
from pathlib import Path

import torch
from transformers import PreTrainedModel

from raytrain_adv import hardware
from raytrain_adv.checkpoint import save
from raytrain_adv.checkpoint.folders import Found, all_folders, find, wrong_bytes
from raytrain_adv.config.job import JobConfig
from raytrain_adv.driver.output.output_dir import storage_path
from raytrain_adv.errors import JobError
from raytrain_adv.model import weights
from raytrain_adv.model.adapter import merge_adapters
from raytrain_adv.model.build import build
from raytrain_adv.storage.metrics_file import FILE_NAME, best_step, read
from raytrain_adv.storage.storage import Storage
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.lora import Lora
from raytrain_adv.transforms.quantized_base import QuantizedBase
from raytrain_adv.transforms.transform import Plan

CPU = torch.device("cpu")


def chosen_checkpoint(job: JobConfig, name: str) -> Found:
    """Return the checkpoint that is meant, by step or path; else that of the model that the run
    exported as its best, or the newest. Raises JobError.
    """
    if not name and (best := best_step(read(Path(job.output.output_dir) / FILE_NAME))) is not None:
        name = f"step_{best}"
    root = Storage.at(storage_path(job))
    folders = all_folders(root)
    if name and ("/" in name or Path(name).is_dir()):
        found = find(Storage.at(name))
    else:
        digits = name.removeprefix("step_")
        steps = [f for f in folders if not name or (digits.isdigit() and f[0] == int(digits))]
        found = next((one for *_, f in steps if (one := find(f)) is not None), None)
    if found is not None:
        if damage := wrong_bytes(found.storage, rank=0, world_size=1):
            fix = "name another one with --checkpoint"
            raise JobError("the checkpoint is damaged", f"{found.path}: {damage}", fix)
        return found
    whole = sorted({step for step, _, f in folders if find(f) is not None})
    if not whole:
        run = job.output.output_dir
        export = f"quantize its model: raytrain-adv export {run}/model --output DIR enable_qat=true"
        fix = export if (Path(run) / "model").is_dir() else "run it to its end"
        fix += "; or run with save_strategy: steps"
        raise JobError("the run has no complete checkpoint", f"none in {root.root}", fix)
    there = f"there are {', '.join(f'step_{step}' for step in whole)}"
    raise JobError(f"there is no complete checkpoint {name}", there, "name one")


def restored_model(job: JobConfig, found: Found) -> PreTrainedModel:
    """Return the checkpoint's model in host memory, with its adapters and fake quantization."""
    model, plans = prepared_model(job)
    if job.transform(Lora).enabled:
        weights.load_pretrained(model, job, CPU)
        merge_adapters(model, job)
    Transforms(job).initialize(model, plans, job.train.seed)
    with warnings.catch_warnings():  # PyTorch's, that there is one process: so it is meant
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save.load(found, model)
    Transforms(job).after_step(model)
    return model


def prepared_model(job: JobConfig) -> tuple[PreTrainedModel, dict[str, Plan]]:
    """Return the job's model in host memory, prepared but without its weights, and the plans."""
    facts = hardware.detect(CPU)
    if job.transform(QuantizedBase).enabled:
        job.transform(QuantizedBase).check_package(facts)
    model = build(job)
    plans = Transforms(job).prepare(model, facts)
    weights.materialize(model, CPU)
    return model, plans
