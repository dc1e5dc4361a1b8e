"""What train() gets from its caller: the place among the workers, where to write and report."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist

from raytrain_adv import dtensor
from raytrain_adv.config.job import JobConfig
from raytrain_adv.errors import RaytrainAdvError
from raytrain_adv.run.heartbeat import Heartbeat
from raytrain_adv.run.trackers import Trackers
from raytrain_adv.storage.metrics_file import MetricsFile
from raytrain_adv.storage.storage import Storage

T = TypeVar("T")

REPORT_EVERY_S = 2.0  # Ray Train blocks each report until it took the last one, 0.5 to 2 s (2.60)


class Reporter(Protocol):
    """The runtime's side of a run. All ranks call each method equally often (a barrier)."""

    def metrics(self, row: dict[str, float]) -> None:
        """Take the metrics of a logging step."""
        return

    def checkpoint(self, storage: Storage, name: str, metrics: dict[str, float]) -> None:
        """Register a complete checkpoint; return when it is committed, safe from a kill."""
        return

    def stop_requested(self) -> bool:
        """Whether to end the run after this step, with a checkpoint; rank 0 calls it each step."""
        return False

    def termination_requested(self) -> bool:
        """Whether this process got a termination signal; every rank calls it each step."""
        return False

    def drained(self) -> str:
        """Return the nodes that will be removed soon, each once; every rank calls it each step."""
        return ""


class SilentReporter(Reporter):
    """For torchrun and in-process runs, without a runtime: its answers are the defaults."""


@dataclass
class Run:
    """One attempt at a job, as one rank sees it."""

    device: torch.device
    storage: Storage  # this job's checkpoints: a folder of attempts, which are folders of them
    attempt: str  # folder name of this attempt
    reporter: Reporter
    cpu_group: dist.ProcessGroup | None = None
    """gloo group for agreements between ranks that must not wait for the GPU."""
    restarts: int = 0  # how often this attempt's workers were restarted after a failure
    resume: bool | str = False  # True: from the newest complete checkpoint; a path: from that one
    timeline: dict[str, float] = field(default_factory=dict)  # seconds spent per phase, in order
    metrics: MetricsFile | None = None
    trackers: Trackers | None = None
    heartbeat: Heartbeat = field(default_factory=Heartbeat)  # of the training thread, which made it
    _early: list[dict[str, Any]] = field(default_factory=list)  # rows from before the file
    reported_at: float = 0.0  # time.monotonic of the last metrics handed to the reporter

    @property
    def rank(self) -> int:
        """This worker's number, from 0."""
        return dtensor.rank()

    @property
    def world_size(self) -> int:
        """Number of workers."""
        return dtensor.world_size()

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the files of the run."""
        return self.rank == 0

    def open_metrics(self, metrics: MetricsFile, trackers: Trackers) -> None:
        """Give rank 0 the file and the trackers that rows go to; earlier rows follow."""
        self.metrics, self.trackers = metrics, trackers
        while self._early:
            self.write(self._early.pop(0))

    def close(self) -> None:
        """Flush and close the trackers, and close the file; call it however the run ends."""
        if self.trackers is not None:
            self.trackers.close()
        if self.metrics is not None:
            self.metrics.close()

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl and hand its numbers to the trackers, on rank 0."""
        row = {"time": time.time(), **row}
        if self.metrics is not None:
            self.metrics.append(row)
        elif self.is_main:
            self._early.append(row)
        if self.trackers is not None and "step" in row and row["kind"] != "event":
            self.trackers.log(row, row["step"])

    def report(self, row: dict[str, Any], is_last: bool) -> None:
        """Hand a row's numbers to the runtime, every REPORT_EVERY_S at most; all ranks call it."""
        is_due = time.monotonic() - self.reported_at >= REPORT_EVERY_S or is_last
        if self.agree(int(is_due), dist.ReduceOp.MIN):
            self.reporter.metrics(
                {k: float(v) for k, v in row.items() if isinstance(v, int | float)}
            )
            self.reported_at = time.monotonic()

    def say(self, message: str, event: str = "note", **facts: Any) -> None:
        """Print a sentence on the driver's console and keep it in metrics.jsonl."""
        self.write({"kind": "event", "event": event, "message": message, **facts})

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the run and announce it."""
        self.say(name, event="phase")
        start = time.perf_counter()
        yield
        self.timeline[name] = self.timeline.get(name, 0.0) + time.perf_counter() - start

    def agree(self, value: int, op: dist.ReduceOp.RedOpType, most_s: float | None = None) -> int:
        """Return the minimum, maximum or sum of every rank's value, without touching the GPU.
        Raises RuntimeError if a rank gives none within `most_s`, by default ddp_timeout.
        """
        return self.agree_all([value], op, most_s)[0]

    def agree_all(
        self, values: list[int], op: dist.ReduceOp.RedOpType, most_s: float | None = None
    ) -> list[int]:
        """Return `agree` of several values at the cost of one."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        work: Any = dist.all_reduce(tensor, op=op, group=self.cpu_group, async_op=True)
        work.wait(*([timedelta(seconds=most_s)] if most_s is not None else []))
        return [int(value) for value in tensor.tolist()]

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.cpu_group)
        return box[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """Return on every rank what rank 0 has found. Raises rank 0's RaytrainAdvError on all."""
        found: T | RaytrainAdvError | None = None
        try:
            found = work() if self.is_main else None
        except RaytrainAdvError as error:
            found = error
        found = self.broadcast(found)
        if isinstance(found, RaytrainAdvError):
            raise found
        return cast(T, found)

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in the order of ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        box: list[Any] = [None] * self.world_size
        dist.all_gather_object(box, value, group=self.cpu_group)
        return box

    def fault(self, message: str, **facts: Any) -> None:
        """Report a failure that was handled; the report keeps it."""
        self.say(message, event="fault", **facts)

    def barrier(self) -> None:
        """Wait for every rank, on the CPU."""
        if self.world_size > 1:
            dist.barrier(group=self.cpu_group)


def local_run(job: JobConfig, device: torch.device | None = None) -> Run:
    """Return the run of a process alone or of torchrun, whose environment initializes the group."""
    on_gpu = torch.cuda.is_available() and not job.parallel.use_cpu
    if "RANK" in os.environ and not dist.is_initialized():
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    if device is None:
        device = (
            torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        )
    root = Path(job.ray.ray_storage_path or job.output.output_dir) / "checkpoints"
    return Run(
        device=device,
        storage=Storage.at(str(root)),
        attempt="local",
        reporter=SilentReporter(),
        cpu_group=dist.new_group(backend="gloo") if dist.is_initialized() else None,
        resume=job.output.resume_from_checkpoint or False,
    )
