"""`raytrain-adv preflight [job.yaml]`: the cluster's nodes, and whether a job can run on them."""

from rich.console import Console

from raytrain_adv import tables
from raytrain_adv.config.job import JobConfig
from raytrain_adv.driver.cluster import connect, nodes
from raytrain_adv.driver.plan.data import measure
from raytrain_adv.driver.plan.plan import resolve
from raytrain_adv.driver.preflight import memory, table, verdicts
from raytrain_adv.driver.preflight.probe import Read, read_nodes
from raytrain_adv.transforms.applied import Transforms


def show(job: JobConfig | None, read: Read = read_nodes) -> None:
    """Print what the nodes are; with a job, whether and where it can run. Nothing is reserved,
    started or trained. Raises ClusterError or JobError if the job cannot run.
    """
    console = Console(highlight=False, soft_wrap=True, markup=False)
    if connect.connect(job):
        console.print("Ray was started on this machine: RAY_ADDRESS names no cluster", style="dim")
    if job is None:
        tables.show(table.view(verdicts.check_nodes(nodes.one_worker(), (), read)))
        return
    placement = nodes.resolve_placement(job)
    found = verdicts.check_nodes(placement, list(Transforms(job)), read)
    tables.show(table.view(found))
    placement = verdicts.place(job, placement, found)
    with console.status("reading the data"):
        data = measure(job, lambda sentence: console.print(sentence, style="dim"))
    plan = resolve(job, world_size=placement.fewest, data=data, facts=found.facts)
    for warning in memory.refuse_too_large(job, plan, found):
        console.print(f"warning: {warning}")
    console.print(f"{placement.note}: it can run")
