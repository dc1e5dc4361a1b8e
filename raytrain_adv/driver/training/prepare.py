"""Before the workers start: connect to Ray, check its nodes, tokenize the data, make the plan."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field

from raytrain_adv import hardware
from raytrain_adv.checkpoint.resume import named
from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.prepare import PreparedData, prepare
from raytrain_adv.data.shown import plain, shown_rows
from raytrain_adv.driver.cluster import connect, nodes
from raytrain_adv.driver.cluster.nodes import Placement
from raytrain_adv.driver.output import upload
from raytrain_adv.driver.plan.plan import RunPlan, render_brief, resolve
from raytrain_adv.driver.preflight import memory, table, verdicts
from raytrain_adv.driver.preflight.probe import Read
from raytrain_adv.driver.watch.nodes import HeadWatch, head_address, watching_start
from raytrain_adv.report import record
from raytrain_adv.report.parts import PreflightReport
from raytrain_adv.run import trackers
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.worker.install import fetch


@dataclass
class Progress:
    """What the report keeps of the preparation, also if it is refused halfway."""

    timeline: dict[str, float] = field(default_factory=dict)  # phase -> seconds
    preflight: PreflightReport | None = None


def prepare_run(
    job: JobConfig,
    read: Read,
    say: Callable[[str], None],
    progress: Progress,
    watched: ExitStack,
    record_end: Callable[[BaseException], None],
) -> tuple[Placement, RunPlan, HeadWatch]:
    """Tokenize the data while Ray starts and the nodes are probed; print the plan and wait for
    room. Fills `progress` in; the head is watched until `watched` is left; `record_end` is told if
    it is lost.
    """
    trackers.check(job.output.report_to)
    upload.check(job)
    if job.output.compare_with is not None:
        record.read(job.output.compare_with)  # if it is missing, fail now and not at the end
    if isinstance(job.output.resume_from_checkpoint, str):
        named(job.output.resume_from_checkpoint)  # the same
    start = time.perf_counter() - sum(progress.timeline.values())

    def end(phase: str) -> None:
        progress.timeline[phase] = time.perf_counter() - start - sum(progress.timeline.values())

    data = _in_background(lambda: prepare(job, say))
    has_started = watched.enter_context(watching_start(record_end))
    started_here = connect.connect(job)
    address = head_address()
    say("Ray started on this machine" if started_here else f"joined Ray at {address}")
    say(f"dashboard: {connect.describe_dashboard()}")
    watch = HeadWatch(address, record_end)
    watched.enter_context(watch.watching())
    has_started.set()
    placement = nodes.resolve_placement(job)
    end("Ray")
    found = verdicts.check_nodes(placement, list(Transforms(job)), read)
    progress.preflight = table.report(found)
    say(table.render(found))
    placement = verdicts.place(job, placement, found)
    end("preflight")
    prepared = data.result()
    end("wait for data")
    for row in shown_rows(job, 1):
        say(plain(row))
    fetch(job, found.facts or hardware.detect(), say)
    plan = resolve(job, world_size=placement.fewest, data=prepared, facts=found.facts)
    say(placement.note)
    say(render_brief(plan))
    for warning in memory.refuse_too_large(job, plan, found):
        say(f"warning: {warning}")
    end("plan")
    nodes.wait_for_room(placement, say)
    say("starting the workers: they import PyTorch and connect to each other")
    return placement, plan, watch


def _in_background(work: Callable[[], PreparedData]) -> Future[PreparedData]:
    """Start the work on a daemon thread, which does not keep the process after a refusal."""
    future: Future[PreparedData] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 # raised again by result()
            future.set_exception(error)

    threading.Thread(target=run, name="data", daemon=True).start()
    return future
