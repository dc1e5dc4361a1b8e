"""The first of a run: what can be refused at once, then Ray, which starts while Python imports."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import TypeVar

from raytrain_adv.checkpoint.resume import named
from raytrain_adv.config.job import JobConfig
from raytrain_adv.driver.cluster import connect
from raytrain_adv.driver.output import upload
from raytrain_adv.driver.watch.nodes import HeadWatch, head_address, watching_start
from raytrain_adv.imports import few_collections
from raytrain_adv.report import record
from raytrain_adv.report.parts import PreflightReport
from raytrain_adv.run import trackers

T = TypeVar("T")
HEAVY = ("raytrain_adv.worker.train", "raytrain_adv.driver.plan.plan")
"""They import PyTorch and transformers, and nothing of Ray, whose start imports too."""


@dataclass
class Progress:
    """What the report keeps of a run's driver, also if it is refused halfway."""

    began: float  # unix seconds
    timeline: dict[str, float] = field(default_factory=dict)  # phase -> seconds
    preflight: PreflightReport | None = None

    def end(self, phase: str) -> None:
        """Give a phase the time that has passed since the last one ended."""
        passed = time.time() - self.began - sum(self.timeline.values())
        self.timeline[phase] = self.timeline.get(phase, 0.0) + passed


def start_ray(
    job: JobConfig,
    say: Callable[[str], None],
    progress: Progress,
    watched: ExitStack,
    record_end: Callable[[BaseException], None],
) -> HeadWatch:
    """Start Ray, or join it; HEAVY is imported meanwhile. The head is watched until `watched` is
    left; `record_end` is told if it is lost. Raises RaytrainAdvError.
    """
    trackers.check(job.output.report_to)
    upload.check(job)
    if job.output.compare_with is not None:
        record.read(job.output.compare_with)  # if it is missing, fail now and not at the end
    if isinstance(job.output.resume_from_checkpoint, str):
        named(job.output.resume_from_checkpoint)  # the same
    progress.end("imports")
    has_started = watched.enter_context(watching_start(record_end))
    with _imported_meanwhile():
        started_here = connect.connect(job)
        address = head_address()
        say("Ray started on this machine" if started_here else f"joined Ray at {address}")
        say(f"dashboard: {connect.describe_dashboard()}")
        watch = HeadWatch(address, record_end)
        watched.enter_context(watch.watching())
        has_started.set()
        progress.end("Ray")
    return watch


@contextmanager
def _imported_meanwhile() -> Iterator[None]:
    """Import HEAVY while the block runs, and raise what that raised: PyTorch, half imported, fails
    in another way the second time. An end of the block by an error, as by Ctrl-C, waits for it too:
    Python may crash if it ends while a thread imports.
    """
    with few_collections():
        imported = in_background(lambda: [import_module(name) for name in HEAVY], "imports")
        try:
            yield
        finally:
            wait([imported])
        imported.result()


def in_background(work: Callable[[], T], name: str) -> Future[T]:
    """Start the work on a daemon thread, which does not keep the process after a refusal."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 # raised again by result()
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
