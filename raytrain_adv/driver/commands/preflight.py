"""`raytrain-adv preflight [job.yaml]`: the cluster's nodes, and whether a job can run on them."""

from __future__ import annotations

from rich.console import Console

from raytrain_adv.config.job import JobConfig
from raytrain_adv.driver.cluster import connect
from raytrain_adv.driver.plan.data import look_at as look_at_data
from raytrain_adv.driver.plan.plan import resolve
from raytrain_adv.driver.preflight import (
    host_memory,
    table,
    verdicts,
)
from raytrain_adv.driver.preflight.probe import Read, read_nodes
from raytrain_adv.driver.preflight.verdicts import Preflight
from raytrain_adv.transforms.applied import Transforms


def show(job: JobConfig | None, read: Read = read_nodes) -> None:
    """Print what the cluster's nodes are; with a job, whether and where it can run. Nothing is
    reserved, started or trained.

    Raises:
        ClusterError: when the cluster cannot be joined, or cannot run the job.
        JobError: when the job could not run anywhere.
    """
    console = Console(highlight=False)
    started_here = connect.connect(job)
    if started_here:
        console.print("Ray was started on this machine: RAY_ADDRESS names no cluster", style="dim")
    if job is None:
        _print(console, verdicts.look_at(connect.one_worker(started_here), (), read))
        return
    placement = connect.settle(job, started_here)
    found = verdicts.look_at(placement, list(Transforms(job)), read)
    _print(console, found)
    placement = verdicts.settled(job, placement, found)
    with console.status("reading the data"):
        data = look_at_data(job, lambda sentence: console.print(sentence, style="dim"))
    plan = resolve(job, world_size=placement.fewest, data=data, facts=found.facts)
    too_large = verdicts.refuse_too_large(job, plan, found)
    for warning in (*too_large, *host_memory.refuse_too_large(job, plan, found)):
        console.print(f"warning: {warning}", markup=False)
    console.print(f"{placement.note}: it can run", markup=False)


def _print(console: Console, found: Preflight) -> None:
    if console.is_terminal:
        console.print(table.view(found), width=min(console.width, table.WIDTH))
    else:
        print(table.render(found))
