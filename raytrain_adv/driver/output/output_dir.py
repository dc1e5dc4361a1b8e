"""The output folder of one run: its contents decide if a job starts, resumes, or is refused."""

import contextlib
import fcntl
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from raytrain_adv.checkpoint import folders
from raytrain_adv.config.job import JobConfig, transform_types
from raytrain_adv.driver.output.replaced import (
    ASIDE,
    OWNER,
    PREVIOUS,
    RUN_FILE,
    Replaced,
    is_inside,
    put_back,
    storage_below,
)  # fmt: skip
from raytrain_adv.errors import JobError, StorageError
from raytrain_adv.kernels import lock as locks
from raytrain_adv.redaction import redact
from raytrain_adv.report import record as reports
from raytrain_adv.storage.atomic import write_without_space
from raytrain_adv.storage.metrics_file import FILE_NAME, read
from raytrain_adv.storage.storage import Storage, storage_errors
from raytrain_adv.text import ascii_name, listed
from raytrain_adv.transforms.hub_kernels import HubKernels

SWEEP_FILE = "sweep.json"
LOCK = ".lock"
RAYS_COPIES = "/runtime_resources/working_dir_files/"  # where Ray unpacks a job's folder (2.60)
CONTINUES = (
    "overwrite_output_dir: the unfinished run of this job in {folder} continues from step {step}; "
    "resume_from_checkpoint: false keeps it in previous and starts again"
)
ENDED = {"failed": "has failed part of the way", "stopped": "was stopped part of the way"}
Record = Mapping[str, Any]  # of run.json
MODELS = ("model", *(f"model-{kind.converts}" for kind in transform_types() if kind.converts))
"""Folders of trained weights in output_dir."""
WEIGHTS = (*MODELS, "model-base", "model-merged")
"""And those of what an adapter belongs to, and of its sum with that."""
OURS = (
    *WEIGHTS,
    *(f".{name}.partial" for name in WEIGHTS),
    *(
        "report.json",
        "report.html",
        "evaluation.json",
        "metrics.jsonl",
        "checkpoints",
        "trackers",
        "bad_batches",
    ),
    *(locks.FOLDER, locks.FILE_NAME, RUN_FILE),
)


@dataclass(frozen=True)
class Output:
    """Where this run writes."""

    folder: Path
    storage_path: str  # folder or URI below which Ray keeps this job's attempts
    attempt: str  # name of this attempt, in Ray and as a folder
    resume: bool | str
    finished: bool  # whether the same job has already run to its end here
    number: int  # the number of attempts, including this one
    replaced: Replaced  # the previous content of the folder, which this run replaces
    remark: str = ""  # what becomes of an earlier run there, for the plan and the console

    @property
    def storage(self) -> Storage:
        """The root of this job's checkpoints."""
        return Storage.at(self.storage_path)

    def begin(self, job: JobConfig, say: Callable[[str], None]) -> None:
        """Move or delete what this run replaces, and write run.json. Raises StorageError."""
        if self.replaced.is_there:
            say(self.replaced.clear())
            self.own()
            self.note(job, "running", self.number)

    def own(self) -> None:
        """Claim storage that is outside of output_dir for this folder. Raises JobError if a run of
        another folder claimed it at the same time.
        """
        mine = {"output_dir": str(self.folder.resolve())}
        if not is_inside(self.storage, self.folder):
            owner = self.storage.claim(OWNER, mine)
            if owner != mine:
                raise _anothers(self.storage, self.folder, owner.get("output_dir"))

    def note(self, job: JobConfig, status: str, attempts: int) -> None:
        """Write run.json: the folder's job and the status of its run."""
        record = {"fingerprint": job.fingerprint(), "status": status, "attempts": attempts}
        record |= {"job": redact(job.flat()), "time": time.time()}
        try:
            Storage.at(str(self.folder)).write_json(RUN_FILE, record)
        except StorageError:  # the status is a few bytes: it is not running for ever
            path = self.folder / RUN_FILE
            with contextlib.suppress(OSError):
                if write_without_space(path, json.dumps(record, indent=1).encode()):
                    return
            raise


def storage_path(job: JobConfig) -> str:
    """Return the folder or URI that holds this job's attempts and their checkpoints."""
    return storage_below(Path(job.output.output_dir), job.ray.ray_storage_path, job.run_name)


@contextmanager
def held(folder: Path, active: JobError | None = None) -> Iterator[None]:
    """Lock the folder for this driver. Raises JobError if another one is running in it (`active`,
    if given), or if it would not last.
    """
    if RAYS_COPIES in str(folder.absolute()):
        raise JobError(
            "output_dir would lie in Ray's copy of the working directory, which Ray deletes",
            str(folder.absolute()),
            "set output_dir to an absolute path on storage that all nodes share",
        )
    with storage_errors("output_dir cannot be written", str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0.5)  # is_held may have it for an instant
        except Timeout:
            raise active or JobError(
                "Another run is writing into output_dir right now",
                str(folder),
                "wait for it, stop it, or choose another output_dir",
            ) from None
    try:
        yield
    finally:
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether a driver is running in the folder."""
    try:
        with (folder / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is no lock
        return False
    return False


def record_of(folder: Path) -> Record | None:
    """Return run.json; None if it is missing, torn, or lacks what a rerun reads from it."""
    found = Storage.at(str(folder)).read_json(RUN_FILE)
    kinds = {"fingerprint": str, "status": str, "attempts": int, "job": dict}
    if found is None or any(not isinstance(found.get(k), kind) for k, kind in kinds.items()):
        return None
    return found


def has_ended(folder: Path) -> bool:
    """Whether a run, or a sweep, has ended in this folder."""
    if not folder.is_dir():
        return False
    records = (Storage.at(str(folder)).read_json(name) for name in (RUN_FILE, SWEEP_FILE))
    return any(record is not None and record.get("status") == "done" for record in records)


def runs_in(folder: Path) -> list[Path]:
    """Return the output_dirs in a folder, the newest run first; LLaMA-Factory's lie four folders
    deep (saves/model/lora/sft). Those that a run's folder keeps are left out.
    """
    found = [path for depth in range(5) for path in folder.glob("*/" * depth + RUN_FILE)]
    runs = {path.parent for path in found}
    newest = sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.parent for path in newest if runs.isdisjoint(path.parent.parents)]


def left_in(folder: Path) -> list[str]:
    """Return the names of what a run has left in its folder. One that is, or has, the output_dir of
    a run (saves/model) is not of a run in the folder above.
    """
    return [name for name in OURS if (folder / name).exists() and not runs_in(folder / name)]


def open_output(job: JobConfig) -> Output:
    """Begin what `decided` returns: a start, a continuation, or a rerun. Raises JobError."""
    folder = Path(job.output.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    put_back(folder)
    output = decided(job)
    lock = folder / locks.FILE_NAME  # a new start pins its kernels again
    if output.replaced.is_there and lock.exists():
        lock.replace(folder / ASIDE)
    elif not output.replaced.is_there and not output.resume:
        lock.unlink(missing_ok=True)
    if not output.finished and not output.replaced.is_there:
        output.own()
        output.note(job, "running", output.number)
    return output


def decided(job: JobConfig) -> Output:
    """Return what a launch would be; change nothing. Raises JobError if no key decides it."""
    folder = Path(job.output.output_dir)
    storage = Storage.at(storage_path(job))
    record = record_of(folder)
    resume = job.output.resume_from_checkpoint or False
    replaced = Replaced(folder, OURS, [storage], job.ray.ray_storage_path)
    replaced.deletes = job.output.delete_previous_run
    if (folder / SWEEP_FILE).exists():
        what = "output_dir holds a sweep, not a single run"
        raise JobError(what, str(folder), "choose another output_dir")
    _refuse_mixed_runs(folder)
    refuse_anothers(storage, folder, has_run=record is not None)
    remark = ""
    if record is not None and (step := _step_to_continue(job, record, storage)) is not None:
        resume, remark = True, CONTINUES.format(folder=folder, step=step)
    elif job.output.overwrite_output_dir and resume is not True:
        refuse_to_replace_what_is_read(job, replaced)
        has_ended = bool(left_in(folder)) if record is None else record["status"] == "done"
        replaced.is_there = has_ended or _trained(folder, storage)
        if replaced.is_there:
            remark = describe_replacement(replaced, owned=record is not None)
            record = None
    elif record is None:
        _refuse_foreign_files(folder, resume)
    elif record["status"] == "done" or _trained(folder, storage):
        _refuse_unless_resumed(job, folder, record, resume)
    finished = bool(record and record["status"] == "done" and resume is True)
    before = 0
    if not replaced.is_there:
        before = int(record["attempts"]) if record else attempts_in(storage)
    name = f"{ascii_name(job.run_name)}_{before + 1:03d}"  # Ray's metrics take ASCII only (2.60)
    return Output(folder, storage_path(job), name, resume, finished, before + 1, replaced, remark)


def _step_to_continue(job: JobConfig, record: Record, storage: Storage) -> int | None:
    """Return the step from which overwrite_output_dir continues an unfinished run of this job."""
    output = job.output
    starts_again = output.resume_from_checkpoint is not None or output.delete_previous_run
    is_same = record["fingerprint"] == job.fingerprint() and record["status"] != "done"
    if not output.overwrite_output_dir or starts_again or not is_same:
        return None
    found = folders.newest(storage)
    return found.progress.step if found is not None and found.optimizer else None


def describe_replacement(replaced: Replaced, owned: bool) -> str:
    """Return what becomes of an earlier run. Raises JobError if it may not be deleted."""
    if not replaced.deletes:
        kept = replaced.folder / PREVIOUS
        return f"the earlier run in {replaced.folder} is kept in {kept} (overwrite_output_dir)"
    if not owned:
        raise JobError(
            "delete_previous_run deletes only what a run of this package has written",
            f"{replaced.folder}: no sound {RUN_FILE} or {SWEEP_FILE} that identifies the run",
            "set delete_previous_run: false to keep it in output_dir/previous, or delete it",
        )
    return f"the earlier run in {replaced.folder} is deleted (delete_previous_run)"


def attempts_in(storage: Storage) -> int:
    """Return how many attempts left something: Ray does not start twice under one name."""
    numbers = (re.search(r"_(\d+)r*$", name) for name in storage.folders())
    return max((int(number[1]) for number in numbers if number), default=0)


def _trained(folder: Path, storage: Storage) -> bool:
    """Whether the run there has left anything that could be lost."""
    rows = read(folder / FILE_NAME)
    if (folder / "model").exists() or any(row["kind"] == "train" for row in rows):
        return True
    return any(storage.folder(attempt).folders() for attempt in storage.folders())


def refuse_to_replace_what_is_read(job: JobConfig, replaced: Replaced) -> None:
    """Refuse a job that reads from the run that it replaces. Raises JobError naming the key."""
    compared, resume = job.output.compare_with, job.output.resume_from_checkpoint
    report = None if compared is None else str(Path(compared) / reports.FILE_NAME)
    replaced.refuse_to_replace("model_name_or_path", job.model.model_name_or_path)
    replaced.refuse_to_replace("kernels_lock", job.transform(HubKernels).kernels_lock)
    replaced.refuse_to_replace("compare_with", report)
    if isinstance(resume, str):
        replaced.refuse_to_replace("resume_from_checkpoint", resume)


def refuse_anothers(storage: Storage, folder: Path, has_run: bool) -> None:
    """Raise JobError if `storage`, for this run's checkpoints, has those of another folder's run.
    `has_run`: this folder holds a run, perhaps from before owners were recorded.
    """
    if is_inside(storage, folder):
        return
    with storage_errors("ray_storage_path cannot be read", storage.root):
        owner, found = storage.read_json(OWNER), storage.folders()
    other = owner.get("output_dir") if owner is not None else None
    if other == str(folder.resolve()) or (owner is None and (has_run or not found)):
        return
    raise _anothers(storage, folder, other)


def _anothers(storage: Storage, folder: Path, other: str | None) -> JobError:
    return JobError(
        "ray_storage_path holds the checkpoints of another run of this name",
        f"{storage.root}: of the run in {other or 'an unknown output_dir'}; "
        f"this one's is {folder.resolve()}",
        "set another ray_run_name or ray_storage_path; if it is the same run, and its folder was "
        f"moved, delete {storage.path(OWNER)}",
    )


def _refuse_mixed_runs(folder: Path) -> None:
    """Raise JobError if this run would write where another run is, or the other way round."""
    below = [str(run) for name in OURS for run in runs_in(folder / name)]
    if below:
        raise JobError(
            "output_dir has another run where this run would write",
            f"{folder}: {listed(below, 4)}",
            f"choose another output_dir, such as {folder / 'NAME'}",
        )
    for above in folder.absolute().parents:
        first, *rest = folder.absolute().relative_to(above).parts
        is_kept = first == PREVIOUS and not rest
        if (first in OURS or is_kept) and (above / RUN_FILE).exists():
            raise JobError(
                f"output_dir is in {first}, which is of another run",
                f"{folder}: the run is in {above}",
                f"choose another output_dir, such as {above.parent / 'NAME'}",
            )


def _refuse_foreign_files(folder: Path, resume: bool | str) -> None:
    there = left_in(folder)
    if there and not resume:
        raise JobError(
            "output_dir holds files that this run would overwrite",
            f"{folder}: {', '.join(there)}, and no sound {RUN_FILE} that identifies their run",
            f"choose another output_dir, or set overwrite_output_dir: true (kept in {PREVIOUS}); "
            f"raytrain-adv doctor {folder} --fix repairs the folder of a run",
        )


def _refuse_unless_resumed(
    job: JobConfig, folder: Path, record: Record, resume: bool | str
) -> None:
    out = "choose another output_dir, or set overwrite_output_dir: true to start again (this run "
    out += f"is kept in {folder / PREVIOUS})"
    if record["fingerprint"] != job.fingerprint():
        raise JobError(
            "output_dir holds the run of a job with other settings",
            "\n".join([f"{folder} ({record['status']})", *job.differences(record["job"])]),
            ("restore these keys to continue it, " if resume else "") + out,
        )
    if not resume and record["status"] == "done":
        found = f"{folder}: nothing is left to train; its report is {folder / 'report.html'}"
        raise JobError("This job has run to its end in output_dir", found, out)
    if not resume:
        state = ENDED.get(record["status"], "has been started and has not ended")
        fix = f"set resume_from_checkpoint: true to continue from its last checkpoint, {out}"
        raise JobError(f"This job {state} in output_dir", str(folder), fix)
