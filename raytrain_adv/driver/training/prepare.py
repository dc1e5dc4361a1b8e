"""Before the workers start: check Ray's nodes, tokenize the data, make the plan."""

import threading
from collections.abc import Callable
from concurrent.futures import Future

from raytrain_adv import hardware
from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.prepare import PreparedData, prepare
from raytrain_adv.data.shown import plain, shown_rows
from raytrain_adv.driver.cluster import nodes
from raytrain_adv.driver.cluster.nodes import Placement
from raytrain_adv.driver.plan.plan import RunPlan, render_brief, resolve
from raytrain_adv.driver.preflight import memory, table, verdicts
from raytrain_adv.driver.preflight.probe import Read
from raytrain_adv.driver.training.start import Progress
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.worker.install import fetch


def prepare_run(
    job: JobConfig, read: Read, say: Callable[[str], None], progress: Progress
) -> tuple[Placement, RunPlan]:
    """Tokenize the data while the nodes are probed; print the plan and wait for room. Fills
    `progress` in.
    """
    data = _in_background(lambda: prepare(job, say))
    placement = nodes.resolve_placement(job)
    found = verdicts.check_nodes(placement, list(Transforms(job)), read)
    progress.preflight = table.report(found)
    say(table.render(found))
    placement = verdicts.place(job, placement, found)
    progress.end("preflight")
    prepared = data.result()
    progress.end("wait for data")
    for row in shown_rows(job, 1):
        say(plain(row))
    fetch(job, found.facts or hardware.detect(), say)
    plan = resolve(job, world_size=placement.fewest, data=prepared, facts=found.facts)
    say(placement.note)
    say(render_brief(plan))
    for warning in memory.refuse_too_large(job, plan, found):
        say(f"warning: {warning}")
    progress.end("plan")
    nodes.wait_for_room(placement, say)
    say("starting the workers: they import PyTorch and connect to each other")
    return placement, plan


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
