"""Rules between keys of different sections: what cannot stand together, and what has no effect."""

import os
from collections.abc import Iterable
from pathlib import Path

from raytrain_adv.config.job import JobConfig
from raytrain_adv.config.problems import Problem, job_error, show
from raytrain_adv.config.section import Section
from raytrain_adv.config.sweep import SWITCH
from raytrain_adv.errors import JobError

MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4095
"""What Linux file systems hold."""


def contradictions(job: JobConfig) -> Iterable[Problem]:
    """Find keys of different sections that cannot stand together; each Problem names them all."""
    yield from _paths(job)
    yield from _evaluation(job)
    yield from _workers(job)
    yield from _devices(job)
    yield from _resuming(job)
    yield from _adapters(job)
    yield from _exclusive(job)
    for section in job.sections():
        if section.enabled:
            yield from section.conflicts(job)
    yield from _loss(job)
    yield from _float8_activations(job)
    yield from _delay(job)
    yield from _turned_off(job)


def notes(job: JobConfig) -> Iterable[str]:
    """Return a sentence for each key that another key of the same file leaves without effect."""
    output, train = job.output, job.train
    if train.pure_bf16 and train.bf16:
        yield "bf16: true changes nothing: pure_bf16: true wins"
    if train.max_steps > 0 and "num_train_epochs" in train.model_fields_set:
        epochs, steps = train.num_train_epochs, train.max_steps
        yield f"num_train_epochs: {epochs:g} changes nothing: max_steps: {steps} wins"
    if output.save_strategy != "steps" and output.asked_for("save_steps"):
        other = f"save_strategy is {output.save_strategy}"
        yield f"save_steps: {output.save_steps:g} changes nothing: {other}"
    if output.save_strategy == "no":
        for key in ("save_total_limit", "save_only_model"):
            if output.asked_for(key):
                yield f"{key}: {show(getattr(output, key))} changes nothing: save_strategy is no"
        if job.ray.max_failures:
            yield "max_failures restarts at the first step: save_strategy is no"
    if output.eval_strategy != "steps" and output.eval_steps is not None:
        other = f"eval_strategy is {output.eval_strategy}"
        yield f"eval_steps: {output.eval_steps:g} changes nothing: {other}"
    if train.asked_for("per_device_eval_batch_size") and not _evaluates(job):
        size = train.per_device_eval_batch_size
        yield f"per_device_eval_batch_size: {size} changes nothing: no rows are held out"
    if output.run_name is not None and output.report_to in ("none", [], ["none"]):
        yield f"run_name: {show(output.run_name)} changes nothing: report_to is none"
    if job.model.asked_for("model_revision") and Path(job.model.model_name_or_path).is_dir():
        revision = show(job.model.model_revision)
        yield f"model_revision: {revision} changes nothing: model_name_or_path is a folder"


def _paths(job: JobConfig) -> Iterable[Problem]:
    """Find paths that no file system can hold, and files where a folder is needed."""
    model, data, output, ray = job.model, job.data, job.output, job.ray
    folders = {
        "dataset_dir": data.dataset_dir,
        "tokenized_path": data.tokenized_path,
        "cache_dir": model.cache_dir,
        "output_dir": output.output_dir,
    }
    named = {
        **folders,
        "model_name_or_path": model.model_name_or_path,
        "dataset": data.dataset,
        "eval_dataset": data.eval_dataset,
        "resume_from_checkpoint": output.resume_from_checkpoint,
        "run_name": output.run_name,
        "ray_run_name": ray.ray_run_name,
        "ray_storage_path": ray.ray_storage_path,
    }
    for key, value in named.items():
        paths = value if isinstance(value, list) else str(value or "").split(",")
        longest = max(len(os.fsencode(name)) for path in paths for name in path.split("/"))
        whole = max(len(os.fsencode(path)) for path in paths)
        if longest > MAX_NAME_BYTES or whole > MAX_PATH_BYTES:
            text = f"a name of {longest} bytes in a path of {whole}"
            fix = f"give names of at most {MAX_NAME_BYTES} bytes, {MAX_PATH_BYTES} in all"
            yield Problem(text, fix, key)
        elif key in folders and isinstance(value, str) and _is_other_than_a_folder(value):
            yield Problem(f"{show(value)} is there, and is not a folder", "name a folder", key)


def _is_other_than_a_folder(path: str) -> bool:
    try:
        return os.path.exists(path) and not os.path.isdir(path)
    except ValueError:
        return False


def _evaluates(job: JobConfig) -> bool:
    return job.data.eval_dataset is not None or job.data.val_size > 0


def _evaluation(job: JobConfig) -> Iterable[Problem]:
    output = job.output
    if output.eval_strategy != "no" and not _evaluates(job):
        yield Problem(
            f"eval_strategy: {output.eval_strategy} without rows to evaluate",
            "hold rows out with val_size, or name an eval_dataset",
            "eval_strategy",
        )
    if output.eval_steps is not None and "eval_strategy" not in output.model_fields_set:
        rows = "" if _evaluates(job) else ", and hold rows out with val_size or eval_dataset"
        yield Problem(
            "eval_steps without eval_strategy would evaluate nothing",
            f"set eval_strategy: steps{rows}",
            "eval_steps",
        )


def check_workers(job: JobConfig, num_workers: int | None) -> None:
    """Refuse a number of workers, other than the job's own, that could not run the job.

    Raises:
        JobError: naming the key that stands against it.
    """
    if num_workers is not None and (problem := _misfit(job, num_workers, "--workers")):
        raise job_error("The command line", [problem])


def _workers(job: JobConfig) -> Iterable[Problem]:
    workers = job.ray.ray_num_workers
    if isinstance(workers, int) and (problem := _misfit(job, workers, "ray_num_workers")):
        yield problem


def _misfit(job: JobConfig, workers: int, key: str) -> Problem | None:
    shard = job.parallel.fsdp_shard_size
    if shard is None or workers % shard == 0:
        return None
    return Problem(
        f"{workers} workers cannot be divided into groups of {shard}",
        f"give an fsdp_shard_size that divides {key}, or delete it",
        f"fsdp_shard_size and {key}",
    )


def _devices(job: JobConfig) -> Iterable[Problem]:
    if not job.parallel.use_cpu:
        return
    if (job.ray.resources_per_worker or {}).get("GPU", 0.0) > 0:
        yield Problem(
            "one asks for GPUs, the other for none",
            "keep one of them",
            "use_cpu and resources_per_worker",
        )
    if job.model.flash_attn in ("fa2", "fa3") or job.model.flash_attn.startswith("hub:"):
        text = f"flash_attn: {job.model.flash_attn} needs a GPU"
        yield Problem(text, "set flash_attn: auto, or use_cpu: false", "use_cpu and flash_attn")


def _resuming(job: JobConfig) -> Iterable[Problem]:
    output = job.output
    path = output.resume_from_checkpoint
    if (
        isinstance(path, str)
        and output.overwrite_output_dir
        and _is_inside(path, output.output_dir)
    ):
        yield Problem(
            "the checkpoint to go on from is in the folder that is to be emptied",
            "set overwrite_output_dir: false, or choose another output_dir",
            "resume_from_checkpoint and overwrite_output_dir",
        )
    if job.ray.max_failures and output.save_only_model and output.save_strategy != "no":
        text = "checkpoints without optimizer states cannot be restarted from"
        fix = "set save_only_model: false, or delete max_failures"
        yield Problem(text, fix, "max_failures and save_only_model")


def _adapters(job: JobConfig) -> Iterable[Problem]:
    if not any(t.enabled and "finetuning_type" in type(t).model_fields for t in job.transforms):
        return
    default = "" if _is_given(job, "finetuning_type") else ", its default"
    if job.model.train_from_scratch:
        yield Problem(
            "adapters alone are saved, and random weights would be lost: "
            f"finetuning_type is lora{default}",
            "set finetuning_type: full",
            "train_from_scratch and finetuning_type",
        )
    if job.train.pure_bf16:
        yield Problem(
            f"adapters are always trained in float32: finetuning_type is lora{default}",
            "set bf16: true in the place of pure_bf16; the frozen model is then in bfloat16",
            "pure_bf16 and finetuning_type",
        )


def _exclusive(job: JobConfig) -> Iterable[Problem]:
    """Find transforms that cannot be on together, and those that are on without one they need."""
    on = [t for t in job.transforms if t.enabled]
    for transform in on:
        for key, reason in transform.needs.items():
            if not any(key in type(other).model_fields for other in on):
                owner = next(t for t in job.transforms if key in type(t).model_fields)
                own = next(k for k in type(transform).model_fields if _is_switch(transform, k))
                fix = f"set {key}: {owner.default(key)}, or delete {own}"
                yield Problem(reason, fix, f"{key} and {own}")
        for key, reason in transform.excludes.items():
            if any(key in type(other).model_fields for other in on):
                own = next(k for k in type(transform).model_fields if _is_switch(transform, k))
                yield Problem(reason, "turn one of the two off", f"{key} and {own}")


def _loss(job: JobConfig) -> Iterable[Problem]:
    """Find a loss kernel that the job's precision or device does not have."""
    owner = next((t for t in job.transforms if "loss_kernel" in type(t).model_fields), None)
    flat = owner.model_dump() if owner is not None and owner.enabled else {}
    key = "cut_cross_entropy" if flat.get("cut_cross_entropy") else "loss_kernel"
    kernel = key if flat.get(key) is True else flat.get(key)
    half = job.train.bf16 or job.train.pure_bf16
    if kernel == "cut_cross_entropy" and not half:
        text = "cut_cross_entropy computes in bf16 only"
        yield Problem(text, "set bf16: true, or loss_kernel: chunked", f"{key} and bf16")
    if kernel in ("cut_cross_entropy", "liger") and job.parallel.use_cpu:
        text = f"{kernel} is written in Triton and needs a GPU"
        yield Problem(text, "set loss_kernel: chunked, or use_cpu: false", f"{key} and use_cpu")


def _float8_activations(job: JobConfig) -> Iterable[Problem]:
    """Find a run whose quantised model could not be computed, and so not be compared."""
    key = "qat_activation_dtype"
    owner = next((t for t in job.transforms if key in type(t).model_fields), None)
    if owner is None or not owner.enabled or not str(getattr(owner, key)).startswith("float8"):
        return
    none = f"or set {key}: none"
    if job.parallel.use_cpu:
        text = "float8 products need a GPU of compute capability 8.9 or newer"
        yield Problem(text, f"set use_cpu: false, {none}", f"{key} and use_cpu")
    if not (job.train.bf16 or job.train.pure_bf16):
        text = "products of float8 rows come out in bfloat16 alone"
        default = "" if _is_given(job, "bf16") else ", whose default is false"
        yield Problem(text + default, f"set bf16: true, {none}", f"{key} and bf16")


def _delay(job: JobConfig) -> Iterable[Problem]:
    """Find a delay that would outlast the run, where the file says how long that is."""
    owner = next((t for t in job.transforms if SWITCH in type(t).model_fields), None)
    if owner is None or not owner.enabled or job.train.max_steps <= 0:
        return
    try:
        owner.check_length(job.train.max_steps)
    except JobError as error:
        text = f"{error.what[0].lower()}{error.what[1:]}: {error.found}"
        yield Problem(text, error.fix, f"{SWITCH} and max_steps")


def _is_given(job: JobConfig, key: str) -> bool:
    return any(key in section.model_fields_set for section in job.sections())


def _is_inside(path: str, folder: str) -> bool:
    return Path(path).absolute().is_relative_to(Path(folder).absolute())


def _turned_off(job: JobConfig) -> Iterable[Problem]:
    """Find keys of a transform that the job does not use."""
    for transform in job.transforms:
        if transform.enabled:
            continue
        switch = " and ".join(
            key for key in transform.model_fields_set if _is_switch(transform, key)
        )
        for key in transform.model_fields_set:
            if transform.asked_for(key) and not _is_switch(transform, key):
                reason = f"with {switch} as it is set" if switch else "by its own keys"
                text = f"it changes nothing, as its feature is turned off {reason}"
                yield Problem(text, "delete it, or turn the feature on", key)


def _is_switch(transform: Section, key: str) -> bool:
    """Whether this key, set as it is, is what turns the transform off."""
    others = transform.model_dump(include=transform.model_fields_set - {key})
    return type(transform).model_validate(others).enabled != transform.enabled
