"""Checkpoints that are whole or do not count: written in the background, committed by manifest."""

import shutil
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from raytrain_adv.checkpoint.folders import (
    FORMAT,
    MANIFEST,
    Found,
    Progress,
    all_folders,
    read_manifest,
)
from raytrain_adv.checkpoint.load import read_state
from raytrain_adv.checkpoint.staging import HostMemory, plain_like, restore_8bit, stage, tensors_of
from raytrain_adv.checkpoint.write import Writer
from raytrain_adv.config.job import JobConfig
from raytrain_adv.errors import StorageError
from raytrain_adv.model.adapter import frozen_fingerprint
from raytrain_adv.ops.float8.all_gather import as_plain
from raytrain_adv.redaction import redact
from raytrain_adv.run.run import Run
from raytrain_adv.storage.retry import cause, retry
from raytrain_adv.storage.storage import Storage, free_space, storage_errors

PENDING, DONE, FAILED = 0, 1, 2
MENTIONED_WAIT_S = 1.0  # of a whole run
FREE_SPACE = (
    "free space, or choose another ray_storage_path; then run again with "
    "resume_from_checkpoint: true"
)


def model_state(model: nn.Module) -> dict[str, Any]:
    """Return the trainable parameters (all, or the adapters) by clean names, still sharded."""
    state = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    return {
        name: as_plain(value) if isinstance(value, torch.Tensor) else value
        for name, value in state.items()
    }


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Return what a checkpoint holds: trainable parameters and, by default, optimizer states."""
    state: dict[str, Any] = {"model": model_state(model)}
    if optimizer is not None:
        options = StateDictOptions(ignore_frozen_params=True)
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=options)
    return state


def load(found: Found, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Read a checkpoint into the shards, whatever number of workers wrote it. Raises StorageError
    when a file cannot be read, or is more than data.
    """
    state = training_state(model, optimizer)
    read = plain_like(state)
    unreadable = storage_errors("The checkpoint cannot be read", found.path)
    with found.storage.local_copy() as folder, unreadable:
        read_state(read, folder, found.path)
    in_8bit = restore_8bit(state, read)
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    set_model_state_dict(model, read["model"], options=options)
    # 8-bit states were filled in place: loading them would make them plain tensors.
    if optimizer is not None and not in_8bit:
        options = StateDictOptions(ignore_frozen_params=True)
        set_optimizer_state_dict(model, optimizer, read["optimizer"], options=options)


@dataclass(frozen=True)
class Written:
    """What a rank has written of a checkpoint."""

    crc32: dict[str, int]  # name -> checksum of its files
    failures: list[str]  # what failed before it was written, in words


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time; `poll` after each step commits them."""

    def __init__(
        self, job: JobConfig, run: Run, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.job = job
        self.run = run
        self.model = model
        self.base = frozen_fingerprint(job, model) if run.is_main else None
        self.optimizer = None if job.output.save_only_model else optimizer
        self.attempt = run.storage.folder(run.attempt)
        self.group = dist.new_group(backend="gloo") if run.world_size > 1 else None
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.pending: tuple[Progress, Storage, Future[Written], dict[str, float]] | None = None
        self.saved_step: int | None = None
        """The last step saved: saving it twice would first delete the complete checkpoint."""
        self.keep_step: int | None = None
        """A step whose checkpoint save_total_limit does not count: the best so far."""
        self.memory = HostMemory(run.say)
        self.committed: list[int] = []
        self.saved_at = 0.0  # time.monotonic at which the pending one was begun
        self.took_s: list[float] = []  # seconds from the save of each to its commit
        self.waited_s = 0.0  # seconds that training stood still until one was committed

    def save(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Start writing the state after `progress.step`, once; wait for an unfinished one first."""
        if self.saved_step == progress.step:
            return
        self.finish()
        self.saved_step = progress.step
        name = f"step_{progress.step:08d}"
        target = self.attempt.folder(name)
        if self.run.is_main:
            target.delete()
            what = f"the checkpoint of step {progress.step} cannot be created"
            retry(target.make, what, self.run.fault)
        self.run.barrier()
        local = target.root if target.is_local else tempfile.mkdtemp(prefix="raytrain_adv_")
        self.saved_at = time.monotonic()
        state = stage(training_state(self.model, self.optimizer), self.memory)
        done = self.pool.submit(self._write, progress.step, state, local, target)
        self.pending = (progress, target, done, metrics)

    def _write(self, step: int, state: dict[str, Any], local: str, target: Storage) -> Written:
        """Write this rank's shards, in the writer's thread; retry while storage fails."""
        failures: list[str] = []

        def report(message: str) -> None:
            failures.append(message)
            self.run.fault(message)  # of rank 0; the others' follow with the commit

        def write() -> dict[str, int]:
            with storage_errors("The checkpoint cannot be written", target.root):
                writer, alone = Writer(local, state), self.run.world_size == 1
                save_state(state, storage_writer=writer, process_group=self.group, no_dist=alone)
                return writer.crc32

        what = f"the checkpoint of step {step} could not be written"
        try:
            written = retry(write, what, report)
            if not target.is_local:
                retry(lambda: target.upload(local), what, report)
        finally:
            if not target.is_local:
                shutil.rmtree(local, ignore_errors=True)
        return Written(written, failures)

    def poll(self) -> None:
        """Commit the pending checkpoint if every rank has written it; called by all each step."""
        self._prepare_memory()
        if self.pending is None:
            return
        status = self._status(self.pending[2])
        if self.run.agree(status, dist.ReduceOp.MAX) == FAILED:
            self._raise_failure(*self.pending[1:3])
        if self.run.agree(status, dist.ReduceOp.MIN) == DONE:
            self._commit(*self.pending)

    def _prepare_memory(self) -> None:
        """Take host memory for the copies, once the optimizer has its states."""
        if self.memory.is_prepared or self.job.output.save_strategy == "no":
            return
        # To return states before there are any, PyTorch would make a step.
        has_states = self.optimizer is None or len(self.optimizer.state) > 0
        if self.run.device.type == "cuda" and has_states:
            self.memory.prepare(tensors_of(training_state(self.model, self.optimizer)))

    def finish(self) -> None:
        """Wait for the pending checkpoint and commit it."""
        if self.pending is None:
            return
        began = time.monotonic()
        self.pending[2].exception()  # waits; poll raises on all ranks
        self.run.barrier()
        self.poll()
        self.waited_s += time.monotonic() - began

    def close(self) -> None:
        """Commit what is pending, report what the waiting cost, and stop the thread."""
        waited_s = self.waited_s  # the last one has no steps to hide behind
        self.finish()
        if self.run.is_main and waited_s >= MENTIONED_WAIT_S:
            each = sum(self.took_s) / len(self.took_s)
            self.run.fault(
                f"training waited {waited_s:.1f} s for checkpoints: one takes {each:.1f} s until "
                f"it is committed, longer than the steps between two saves. Each is committed "
                f"before the next is due, so that a failure costs less than two intervals; a "
                f"larger save_steps waits less",
                waited_s=waited_s,
            )
        self.pool.shutdown(wait=True)
        self.memory.release()

    @staticmethod
    def _status(done: Future[Written]) -> int:
        if not done.done():
            return PENDING
        return FAILED if done.exception() is not None else DONE

    def _raise_failure(self, target: Storage, done: Future[Written]) -> None:
        self.pending = None
        free = (
            f"; {free_space(Path(target.root))}" if target.is_local else ""
        )  # before it is deleted
        if self.run.is_main:
            target.delete()
        error = done.exception() if done.done() else None
        if isinstance(error, StorageError):
            raise error
        found, fix = "another worker failed to write its part", "see its error"
        if error is not None:
            found = f"{target.root}: {cause(error)}{free}"
            fix = FREE_SPACE
        raise StorageError("The checkpoint cannot be written", found, fix) from error

    def _commit(
        self, progress: Progress, target: Storage, done: Future[Written], metrics: dict[str, float]
    ) -> None:
        self.pending = None
        parts = self.run.gather(done.result())
        if self.run.is_main:
            for rank, part in enumerate(parts):
                for message in set(part.failures) - set(parts[0].failures):
                    self.run.fault(f"worker {rank}: {message}")
            manifest = self._manifest(progress, target, parts)
            what = f"the checkpoint of step {progress.step} could not be completed"
            retry(lambda: target.write_json(MANIFEST, manifest), what, self.run.fault)
        self.run.barrier()
        self.run.reporter.checkpoint(target, Path(target.root).name, metrics)
        self.committed.append(progress.step)
        self.took_s.append(time.monotonic() - self.saved_at)
        if self.run.is_main:
            message = f"checkpoint of step {progress.step} committed"
            self.run.say(message, event="checkpoint", step=progress.step)
            self._prune()

    def _manifest(
        self, progress: Progress, target: Storage, parts: list[Written]
    ) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "progress": asdict(progress),
            "fingerprint": self.job.fingerprint(),
            "job": redact(self.job.flat()),
            "optimizer": self.optimizer is not None,
            "base": self.base,
            "world_size": self.run.world_size,
            "torch": torch.__version__,
            "files": {name: size for name, size in target.files().items() if name != MANIFEST},
            "crc32": {name: crc for part in parts for name, crc in part.crc32.items()},
        }

    def _prune(self) -> None:
        """Delete complete checkpoints beyond save_total_limit, and torn ones that nobody writes."""
        limit, num_complete = self.job.output.save_total_limit, 0
        for step, _, folder in all_folders(self.run.storage):
            is_complete = read_manifest(folder) is not None
            if step == self.keep_step and is_complete:
                continue
            num_complete += is_complete
            if not is_complete or (limit and num_complete > limit):
                folder.delete()
