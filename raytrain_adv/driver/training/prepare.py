"""Before the workers start: check Ray's nodes, tokenize the data, make the plan."""

from collections.abc import Callable

from raytrain_adv import hardware
from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.prepare import prepare
from raytrain_adv.data.shown import plain, shown_rows
from raytrain_adv.driver.cluster import nodes
from raytrain_adv.driver.cluster.nodes import Placement
from raytrain_adv.driver.plan.plan import RunPlan, render_brief, resolve
from raytrain_adv.driver.preflight import memory, table, verdicts
from raytrain_adv.driver.preflight.probe import Read
from raytrain_adv.driver.training.start import Progress, in_background
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.worker.install import fetch


def prepare_run(
    job: JobConfig, read: Read, say: Callable[[str], None], progress: Progress
) -> tuple[Placement, RunPlan]:
    """Tokenize the data while the nodes are probed; print the plan and wait for room. Fills
    `progress` in.
    """
    data = in_background(lambda: prepare(job, say), "data")
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
