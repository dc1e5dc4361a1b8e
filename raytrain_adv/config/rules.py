"""Rules between keys of different sections: contradictions, and keys without effect."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from raytrain_adv.config.job import JobConfig, num_passes, sharing
from raytrain_adv.config.problems import ON_COMMAND_LINE, Problem, job_error, show
from raytrain_adv.config.section import Section
from raytrain_adv.config.sweep import SWITCH
from raytrain_adv.config.training import ADAPTIVE

MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4095
"""Limits of Linux file systems."""


USUAL = {
    "learning_rate": (1e-8, 0.1, "AdamW moves each weight by about that much in a step"),
    "adam_epsilon": (0.0, 0.01, "updates are divided by it where it exceeds the gradients"),
    "weight_decay": (0.0, 1.0, "each step shrinks weights by that times the learning rate"),
    "max_grad_norm": (0.0, 1e4, "larger gradients are hardly ever seen: nothing is clipped"),
    "num_train_epochs": (0.0, 1000, "the data are read that many times"),
    "max_steps": (-1, 10**8, "at ten steps a second that is four months"),
    "warmup_steps": (0, 10**6, "the learning rate rises that long"),
    "gradient_accumulation_steps": (1, 10**4, "the weights change once in so many passes"),
    "per_device_train_batch_size": (1, 4096, "one pass takes that many sequences"),
    "cutoff_len": (16, 2**20, "memory for activations grows with it"),
    "lora_rank": (1, 1024, "adapters of full rank have as many numbers as the weights"),
    "neftune_noise_alpha": (0.0, 100.0, "noise of that size is added to the embeddings"),
    "preprocessing_num_workers": (1, 512, "each is a process with a tokenizer of its own"),
    "step_timeout": (5.0, 10**6, "a step that takes longer ends all workers"),
    "save_steps": (0.0, 10**6, "a fault costs the steps since the last checkpoint"),
}
"""Key -> smallest and largest value that nobody would question, and what others mean."""


def contradictions(job: JobConfig) -> Iterable[Problem]:
    """Find keys of different sections that contradict each other; each Problem names them all."""
    for rule in (
        _paths,
        _evaluation,
        _workers,
        _devices,
        _resuming,
        _exclusive,
        _unmet,
        _twin,
        _reference,
    ):
        yield from rule(job)
    for section in job.sections():
        if section.enabled:
            yield from section.conflicts(job)
    yield from _turned_off(job)


def notes(job: JobConfig) -> Iterable[str]:
    """Return a sentence for each key that another key of the job makes ineffective."""
    output, train = job.output, job.train
    if train.pure_bf16 and train.bf16:
        yield "bf16: true changes nothing: pure_bf16: true wins"
    if train.stage == "pt":
        for key in ("default_system", "enable_thinking", "train_on_prompt", "mask_history"):
            if job.data.is_changed(key):
                yield f"{key}: {show(getattr(job.data, key))} changes nothing: stage is pt"
    if train.max_steps > 0 and "num_train_epochs" in train.model_fields_set:
        epochs, steps = train.num_train_epochs, train.max_steps
        yield f"num_train_epochs: {epochs:g} changes nothing: max_steps: {steps} wins"
    if output.save_strategy != "steps" and output.is_changed("save_steps"):
        other = f"save_strategy is {output.save_strategy}"
        yield f"save_steps: {output.save_steps:g} changes nothing: {other}"
    if output.save_strategy == "no":
        for key in ("save_total_limit", "save_only_model"):
            if output.is_changed(key):
                yield f"{key}: {show(getattr(output, key))} changes nothing: save_strategy is no"
        if job.ray.max_failures:
            yield "max_failures restarts at the first step: save_strategy is no"
    if output.eval_strategy != "steps" and output.eval_steps is not None:
        other = f"eval_strategy is {output.eval_strategy}"
        yield f"eval_steps: {output.eval_steps:g} changes nothing: {other}"
    if train.is_changed("per_device_eval_batch_size") and not job.data.holds_rows_out:
        size = train.per_device_eval_batch_size
        yield f"per_device_eval_batch_size: {size} changes nothing: no rows are held out"
    if output.run_name is not None and output.report_to in ("none", [], ["none"]):
        yield f"run_name: {show(output.run_name)} changes nothing: report_to is none"
    if _compares(job) and any(t.model_dump().get(SWITCH) == "never" for t in job.transforms):
        yield f"compare: true changes nothing: with {SWITCH}: never the run is its own twin"
    if job.model.is_changed("model_revision") and Path(job.model.model_name_or_path).is_dir():
        revision = show(job.model.model_revision)
        yield f"model_revision: {revision} changes nothing: model_name_or_path is a folder"
    for section in job.sections():
        yield from section.without_effect(job)
        yield from _unusual(section)
    for _, own, key, care in _together(job, careful=True):
        yield f"{own} and {key} need care together: {care}"


def _unusual(section: Section) -> Iterable[str]:
    for key, (least, most, why) in USUAL.items():
        value: Any = getattr(section, key) if key in type(section).model_fields else None
        is_number = isinstance(value, int | float) and section.is_changed(key)
        if is_number and not least <= value <= most:
            yield f"{key}: {value:g} is unusual (usual: {least:g} to {most:g}): {why}"


def _paths(job: JobConfig) -> Iterable[Problem]:
    """Find paths that are too long, files where folders are expected, and unusable run names."""
    model, data, output = job.model, job.data, job.output
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
        "ray_run_name": job.ray.ray_run_name,
        "ray_storage_path": job.ray.ray_storage_path,
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
            yield Problem(f"{show(value)} exists but is not a folder", "name a folder", key)
    whole_of = {Path("/"): "the whole file system", Path.home(): "your home folder"}
    if shared := whole_of.get(Path("/" + os.path.realpath(output.output_dir).lstrip("/"))):
        text = f"{show(output.output_dir)} is {shared}, and a run's folder is its own"
        yield Problem(text, "name a folder in it", "output_dir")
    name = job.ray.ray_run_name
    if name is not None and (name.strip() in ("", ".", "..") or "/" in name or "\\" in name):
        text = f"{show(name)} is not the name of one folder"
        yield Problem(text, "give letters, digits, - and _, or delete the line", "ray_run_name")


def _is_other_than_a_folder(path: str) -> bool:
    try:
        return os.path.exists(path) and not os.path.isdir(path)
    except ValueError:
        return False


def _evaluation(job: JobConfig) -> Iterable[Problem]:
    output, hold_out = job.output, "hold rows out with val_size, or name an eval_dataset"
    if output.eval_strategy != "no" and not job.data.holds_rows_out:
        text = f"eval_strategy: {output.eval_strategy} without rows to evaluate"
        yield Problem(text, hold_out, "eval_strategy")
    follows = {
        "load_best_model_at_end": output.load_best_model_at_end,
        "early_stopping_steps": output.early_stopping_steps is not None,
        "lr_scheduler_type": job.train.lr_scheduler_type in ADAPTIVE,
    }
    for key in (key for key, on in follows.items() if on and output.eval_strategy == "no"):
        text = "it follows the evaluations during the run, and there are none"
        fix = "set eval_strategy: steps or epoch, and hold rows out"
        yield Problem(text, fix, f"{key} and eval_strategy")
    if output.eval_on_each_dataset and job.data.eval_dataset is None:
        text = "the held-out rows are not of eval_dataset"
        yield Problem(text, "name eval_dataset, or delete it", "eval_on_each_dataset")
    for key in ("eval_on_start", "compute_accuracy"):
        if getattr(output, key) and not job.data.holds_rows_out:
            yield Problem("there are no rows to evaluate", hold_out, key)
    if output.eval_steps is not None and "eval_strategy" not in output.model_fields_set:
        rows = (
            "" if job.data.holds_rows_out else ", and hold rows out with val_size or eval_dataset"
        )
        text = "eval_steps without eval_strategy would evaluate nothing"
        yield Problem(text, f"set eval_strategy: steps{rows}", "eval_steps")


def check_workers(job: JobConfig, num_workers: int | None) -> None:
    """Check a number of workers from the command line against the job. Raises JobError naming the
    key that it conflicts with.
    """
    if num_workers is not None and (problem := _misfit(job, num_workers, "--workers")):
        raise job_error(ON_COMMAND_LINE, [problem])


def _workers(job: JobConfig) -> Iterable[Problem]:
    key = "ray_num_workers"
    workers = job.ray.ray_num_workers
    if isinstance(workers, int) and (problem := _misfit(job, workers, key)):
        yield problem
    if job.ray.ends is not None and job.ray.ends[0] < job.ray.ends[1]:
        # The most first: if it does not fit, a problem of the fewest would not help.
        problems = (_misfit(job, number, key) for number in reversed(job.ray.ends))
        yield from list(filter(None, problems))[:1]
        yield from _elastic(job)


def _elastic(job: JobConfig) -> Iterable[Problem]:
    """Find keys that leave an elastic run no checkpoint to continue from."""
    text = "a changed number of workers continues from the last checkpoint"
    if job.output.save_strategy == "no":
        keys = "ray_num_workers and save_strategy"
        yield Problem(f"{text}, and none is written", "set save_strategy: steps", keys)
    elif job.output.save_only_model:
        keys = "ray_num_workers and save_only_model"
        yield Problem(f"{text}, with its optimizer states", "set save_only_model: false", keys)


def _misfit(job: JobConfig, workers: int, key: str) -> Problem | None:
    shard, split = job.parallel.fsdp_shard_size, job.parallel.sequence_parallel_size
    if workers % split:
        text = f"{workers:,} cannot be divided into groups of {split} workers that share sequences"
        fix = f"set {key} to a multiple of {split}"
        return Problem(text, fix, f"sequence_parallel_size and {key}")
    passes = num_passes(job, workers)
    if passes % (workers // split):
        good = ", ".join(map(str, sharing(job, passes * split)))
        with_most = passes // job.train.gradient_accumulation_steps
        text = f"{workers} workers cannot share the {passes} passes equally that a step has with "
        fix = f"numbers that work: {good}; or change gradient_accumulation_steps"
        return Problem(f"{text}{with_most}", fix, f"{key} and gradient_accumulation_steps")
    if shard is None or workers % shard == 0:
        return None
    text = f"{workers} workers cannot be divided into groups of {shard}"
    fix = f"give an fsdp_shard_size that divides {key}, or delete it"
    return Problem(text, fix, f"fsdp_shard_size and {key}")


def _devices(job: JobConfig) -> Iterable[Problem]:
    if not job.parallel.use_cpu:
        return
    if (job.ray.resources_per_worker or {}).get("GPU", 0.0) > 0:
        text = "one requests GPUs, the other excludes them"
        yield Problem(text, "keep one of them", "use_cpu and resources_per_worker")
    if job.model.flash_attn in ("fa2", "fa3", "fa4") or job.model.flash_attn.startswith("hub:"):
        text = f"flash_attn: {job.model.flash_attn} needs a GPU"
        yield Problem(text, "set flash_attn: auto, or use_cpu: false", "use_cpu and flash_attn")


def _resuming(job: JobConfig) -> Iterable[Problem]:
    output = job.output
    path = output.resume_from_checkpoint
    emptied = Path(output.output_dir).absolute() if output.overwrite_output_dir else None
    named = Path(path).absolute() if isinstance(path, str) else None
    is_kept = named is not None and named.is_relative_to((emptied or named) / "previous")
    if named and emptied and named.is_relative_to(emptied) and not is_kept:
        text = "the checkpoint to continue from is of the run that would be replaced"
        fix = "set overwrite_output_dir: false, or choose another output_dir"
        yield Problem(text, fix, "resume_from_checkpoint and overwrite_output_dir")
    if job.ray.max_failures and output.save_only_model and output.save_strategy != "no":
        text = "checkpoints without optimizer states cannot be restarted from"
        fix = "set save_only_model: false, or delete max_failures"
        yield Problem(text, fix, "max_failures and save_only_model")


def _exclusive(job: JobConfig) -> Iterable[Problem]:
    """Find features that cannot be on together, each two of them once."""
    seen: list[set[str]] = []
    for section, own, key, reason in _together(job, careful=False):
        if {own, key} not in seen:
            seen.append({own, key})
            off = show(_owner(job, key).default(key), key)
            fix = f"set {key}: {off}, or {own}: {show(type(section).default(own), own)}"
            yield Problem(reason, fix, f"{key} and {own}")


def _unmet(job: JobConfig) -> Iterable[Problem]:
    """Find enabled features without a feature that they require."""
    on = [section for section in job.sections() if section.enabled]
    for section in on:
        for key, reason in section.needs.items():
            if not any(_has(other, key) for other in on):
                own, default = switch(section), _owner(job, key).default(key)
                fix = f"set {key}: {default}, or delete {own}"
                yield Problem(reason, fix, f"{key} and {own}")


def _reference(job: JobConfig) -> Iterable[Problem]:
    if job.train.use_asft_loss and job.model.train_from_scratch:
        text = "random weights are not a model to stay near to"
        yield Problem(text, "keep one of them", "use_asft_loss and train_from_scratch")
    teacher = job.train.distill_model_name_or_path
    if teacher is not None and not os.path.isfile(f"{teacher}/config.json"):
        text, fix = f"{teacher} holds no config.json", "name the folder of a whole model"
        yield Problem(text, fix, "distill_model_name_or_path")
    if not job.train.use_distill_loss or teacher is not None:
        return
    fix = "name a teacher by distill_model_name_or_path"
    if job.model.train_from_scratch:
        text = "random weights teach nothing"
        yield Problem(text, fix, "use_distill_loss and train_from_scratch")
        return
    apart = [t for t in job.transforms if t.converts]
    if not any(t.enabled for t in apart):
        text = "the teacher is the model before training, and nothing sets this one apart from it"
        fix += "".join(f", or set {switch(t)}: true" for t in apart)
        yield Problem(text, fix, "use_distill_loss")


def _compares(job: JobConfig) -> bool:
    return any(t.enabled and t.model_dump().get("compare") for t in job.transforms)


def _twin(job: JobConfig) -> Iterable[Problem]:
    """Find a twin that could not be compared with."""
    if _compares(job) and not job.data.holds_rows_out:
        text = "a twin is compared by the loss on held-out rows, and none are held out"
        yield Problem(text, "hold rows out with val_size, or set compare: false", "compare")


def _together(job: JobConfig, careful: bool) -> Iterable[tuple[Section, str, str, str]]:
    """Yield each rule that applies: the feature, its switch, the other key in use, and why."""
    on = [section for section in job.sections() if section.enabled]
    for section in on:
        for key, reason in (section.careful if careful else section.excludes).items():
            if any(_has(other, key) and other.is_changed(key) for other in on):
                yield section, switch(section), key, reason


def _has(section: Section, key: str) -> bool:
    return key in type(section).model_fields


def _owner(job: JobConfig, key: str) -> type[Section]:
    return next(type(section) for section in job.sections() if _has(section, key))


def switch(section: Section) -> str:
    """Return the key with which the job enables a feature."""
    keys = list(type(section).model_fields)
    return next((key for key in keys if _is_switch(section, key)), keys[0])


def _turned_off(job: JobConfig) -> Iterable[Problem]:
    """Find keys of disabled transforms."""
    for transform, switches, key in unused(job):
        reason = f"with {' and '.join(switches)} as it is set" if switches else "by its own keys"
        text = f"it has no effect: its feature is off {reason}"
        on = next(iter(type(transform).model_fields))
        yield Problem(text, f"delete it, or turn the feature on ({on})", key)


def unused(job: JobConfig) -> Iterator[tuple[Section, list[str], str]]:
    """Yield each disabled transform, the keys that disable it, and a key without effect."""
    for transform in job.transforms:
        if transform.enabled:
            continue
        switches = [key for key in transform.model_fields_set if _is_switch(transform, key)]
        for key in transform.model_fields_set:
            used = key in switches or transform.serves(key, job)
            if transform.is_changed(key) and not used:
                yield transform, switches, key


def _is_switch(transform: Section, key: str) -> bool:
    """Whether the value of this key decides whether the transform is enabled."""
    others = transform.model_dump(include=transform.model_fields_set - {key})
    return type(transform).model_validate(others).enabled != transform.enabled
