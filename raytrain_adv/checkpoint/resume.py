"""Choose the checkpoint that a run resumes from, and refuse those of other jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytrain_adv.checkpoint.folders import (
    AGAIN,
    MANIFEST,
    Found,
    all_folders,
    find,
    newest,
    read_manifest,
    set_aside,
    wrong_bytes,
    wrong_sizes,
)
from raytrain_adv.config.job import JobConfig
from raytrain_adv.errors import JobError
from raytrain_adv.storage.storage import Storage
from raytrain_adv.transforms.transform import Transform

if TYPE_CHECKING:
    from raytrain_adv.run.run import Run
    from raytrain_adv.run.schedule import Arithmetic


def to_resume(job: JobConfig, run: Run, arithmetic: Arithmetic) -> Found | None:
    """Return the checkpoint to resume from, the same on all ranks; None to start at step 0.

    A damaged one is reported and skipped for the one before, unless the job names it. Raises
    JobError when the named checkpoint is not complete, or belongs to another job; StorageError when
    one cannot be read.
    """
    if not run.resume and not run.restarts:
        return None
    while True:
        found = _agreed(job, run, arithmetic)
        if found is None:
            return None
        with run.phase("check the checkpoint"):
            shares = run.gather(wrong_bytes(found.storage, run.rank, run.world_size))
        damage = "\n".join(filter(None, shares))
        if not damage:
            return found
        if found.path == _absolute(run.resume):
            raise _is_damaged(found.path, damage)
        if run.is_main:
            _pass_over(run, found.storage, damage)
        run.barrier()


def _agreed(job: JobConfig, run: Run, arithmetic: Arithmetic) -> Found | None:
    """Return rank 0's choice, on all ranks."""

    def choose() -> str | None:
        chosen = _chosen(job, run, arithmetic)
        return chosen.path if chosen else None

    path = run.on_main(choose)
    if path is None:
        return None
    named = isinstance(run.resume, str) and path == _absolute(run.resume)
    filesystem = Storage.at(str(run.resume)).filesystem if named else run.storage.filesystem
    found = find(Storage(filesystem, path))
    blind = [rank for rank, sees in enumerate(run.gather(found is not None)) if not sees]
    if blind:
        raise JobError(
            "Not all workers see the checkpoint to resume from",
            f"{path}: not seen by rank {', '.join(map(str, blind[:8]))} of {run.world_size}",
            "put it on storage that all nodes share",
        )
    return found


def _absolute(resume: bool | str) -> str | None:
    """Return the folder of a checkpoint that was named."""
    return Storage.at(resume).root if isinstance(resume, str) else None


def _is_damaged(path: str, damage: str) -> JobError:
    return JobError(
        "The checkpoint that resume_from_checkpoint names is damaged",
        f"{path}: {damage}",
        "name another one, or use resume_from_checkpoint: true for the newest undamaged one",
    )


def _pass_over(run: Run, folder: Storage, damage: str) -> None:
    """Report that a checkpoint is damaged, and stop counting it."""
    first = damage.splitlines()[0]
    run.fault(f"{folder.root} is damaged: {first}. The run continues from the one before it.")
    set_aside(folder)


def _chosen(job: JobConfig, run: Run, arithmetic: Arithmetic) -> Found | None:
    """Return the checkpoint to resume from: after a restart this attempt's own, else the job's."""
    again = run.restarts > 0 or run.attempt.endswith(AGAIN)
    if not isinstance(run.resume, str) or again:
        _pass_over_torn(run)
    own = newest(run.storage, run.attempt) if again else None
    found, free = own, frozenset[str]()
    if own is None and isinstance(run.resume, str):
        found, free = named(run.resume), precision_keys(job)
    elif own is None and run.resume:
        found = newest(run.storage)
    if found is not None:
        refuse_other_job(job, found, arithmetic, free)
        for difference in job.differences(found.keys) if free else ():
            run.say(f"the checkpoint is continued in another precision: {difference}")
    return found


def _pass_over_torn(run: Run) -> None:
    """Report checkpoints newer than the newest complete one that lost files after the commit."""
    for _, _, folder in all_folders(run.storage):
        manifest = read_manifest(folder)
        if manifest is None:
            continue
        damage = wrong_sizes(folder, manifest)
        if not damage:
            return
        _pass_over(run, folder, damage)


def refuse_other_base(job: JobConfig, found: Found) -> None:
    """Refuse a checkpoint if the frozen weights, which it does not hold, have changed since. Raises
    JobError.
    """
    from raytrain_adv.model.adapter import base_fingerprint, changed_base  # imports PyTorch

    if found.base is not None and found.base != base_fingerprint(job):
        raise changed_base(job, "the checkpoint was written", found.path)


def named(path: str) -> Found:
    """Return the checkpoint at a path. Raises JobError if it is not complete, or damaged."""
    folder = Storage.at(path)
    found = find(folder)
    manifest = read_manifest(folder) if found is None else None
    if manifest is not None:
        raise _is_damaged(path, wrong_sizes(folder, manifest))
    if found is None:
        raise JobError(
            "resume_from_checkpoint does not name a complete checkpoint",
            f"{path}: no {MANIFEST} that matches the files there",
            "name a step_... folder, or use resume_from_checkpoint: true for the newest complete "
            "one",
        )
    return found


def precision_keys(job: JobConfig) -> frozenset[str]:
    """Return the keys that change how products are computed: a named checkpoint may differ."""
    transforms = [t for t in job.transforms if isinstance(t, Transform) and t.stage == "precision"]
    return frozenset(key for t in transforms for key in type(t).model_fields)


def refuse_other_job(
    job: JobConfig, found: Found, arithmetic: Arithmetic, free: frozenset[str]
) -> None:
    """Refuse a checkpoint of other keys (except those in `free`), other data, or another batch.
    Raises JobError naming each key that differs, with both values.
    """
    if not found.optimizer:
        raise JobError(
            "The checkpoint holds no optimizer states and cannot be resumed",
            f"{found.path} was written with save_only_model: true",
            "start again, or resume from a checkpoint of a run with save_only_model: false",
        )
    same = found.fingerprint == job.fingerprint()
    differences = [] if same else job.differences(found.keys, free)
    if differences:
        raise JobError(
            "The checkpoint belongs to a run with other settings",
            "\n".join([found.path, *differences]),
            "restore these keys to continue, or choose another output_dir (or "
            "overwrite_output_dir: true) to start again",
        )
    batch, rows = found.progress.global_batch, found.progress.num_sequences
    if (batch, rows) != (arithmetic.global_batch, arithmetic.num_sequences):
        now = f"{arithmetic.global_batch} of {arithmetic.num_sequences}"
        raise JobError(
            "The checkpoint was written with another global batch or other data",
            f"checkpoint: {batch} sequences per step of {rows}; this job: {now}",
            "keep per_device_train_batch_size x gradient_accumulation_steps x workers, and "
            "the data, as they were",
        )
