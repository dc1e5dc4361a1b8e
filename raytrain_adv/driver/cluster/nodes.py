"""The cluster's nodes: what they have, how many workers fit on them, and waiting until they do."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import ray
from ray._raylet import PlacementGroupID
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.placement_group import PlacementGroup, remove_placement_group

from raytrain_adv.config.job import CPU_WORKERS, JobConfig, numbers, refuse_without_graph
from raytrain_adv.errors import ClusterError, JobError, Stopped
from raytrain_adv.text import plural

ACCELERATOR = "accelerator_type:"  # prefix of the resource that names a node's GPU


@dataclass(frozen=True)
class Node:
    """A node that is alive, or a kind of node that an autoscaler may start."""

    address: str
    resources: Mapping[str, float]
    count: int = 1
    group: str = ""  # the autoscaler's name for this kind of node
    node_id: str = ""  # Ray's id; empty for a node that is not started yet
    is_draining: bool = False  # whether Ray is about to remove it from the cluster

    @property
    def accelerator(self) -> str:
        """The GPU type that Ray or the cluster's configuration names; empty if none."""
        names = (k.removeprefix(ACCELERATOR) for k in self.resources if k.startswith(ACCELERATOR))
        return next(names, "")

    def num_fitting(self, bundle: Mapping[str, float]) -> int:
        """Return how many bundles fit on one such node."""
        fits = [int(self.resources.get(k, 0.0) / v + 1e-9) for k, v in bundle.items() if v > 0]
        return min(fits) if fits else 10**6


@dataclass(frozen=True)
class Placement:
    """The resources that a job requests from the cluster, with every auto resolved."""

    num_workers: int  # number of workers; the largest one if it may change
    bundle: dict[str, float]  # what each worker reserves
    use_gpu: bool
    note: str  # the request in a sentence, for the console
    avoided: tuple[str, ...] = ()  # ids of the nodes that preflight excluded
    avoided_accelerators: tuple[str, ...] = ()  # types that an autoscaler must not start for this
    numbers: tuple[int, ...] = ()  # the allowed numbers of workers, ascending; empty if fixed
    versions: Mapping[str, str | None] = field(default_factory=dict)
    """Package -> version on the nodes that preflight accepted; each worker compares its own."""

    @property
    def fewest(self) -> int:
        """The fewest workers with which the run continues."""
        return self.numbers[0] if self.numbers else self.num_workers

    def request(self, strategy: str) -> str:
        """Return the requested workers and their resources, for an error's text."""
        each = ", ".join(f"{amount:g} {name}" for name, amount in self.bundle.items())
        elastic = f"{self.fewest} workers at least"
        workers = elastic if self.numbers else plural(self.num_workers, "worker")
        return f"requested: {workers} with {each} each ({strategy})"

    @property
    def label_selector(self) -> dict[str, str] | None:
        """The nodes where workers may run, in Ray's terms; None means any.

        Unusable nodes are excluded rather than usable ones listed, so that a node that joins later
        may be used: each worker checks its own node before it starts.
        """
        unwanted = {
            "ray.io/node-id": self.avoided,
            "ray.io/accelerator-type": self.avoided_accelerators,
        }
        return {key: f"!in({','.join(v)})" for key, v in unwanted.items() if v} or None


def alive_nodes() -> list[Node]:
    """Return the nodes that are alive."""
    draining = ray._private.state.state.get_draining_nodes()  # not public as of ray 2.60
    return [
        Node(
            str(n["NodeManagerAddress"]),
            n["Resources"],
            node_id=str(n["NodeID"]),
            is_draining=n["NodeID"] in draining,
            group=str((n.get("Labels") or {}).get("ray.io/node-group", "")),
        )
        for n in ray.nodes()
        if n["Alive"]
    ]


def scalable_nodes() -> list[Node]:
    """Return the kinds of node that an autoscaler may start, and at most how many of each."""
    # Private, and the only source; Ray Data 2.60 reads it the same way.
    config = ray._private.state.state.get_cluster_config()
    groups = config.node_group_configs if config is not None else ()
    return [
        Node(f"autoscaled {g.name}", dict(g.resources), max(int(g.max_count), 0), group=str(g.name))
        for g in groups
    ]


def startable_nodes(scalable: list[Node], alive: list[Node]) -> list[Node]:
    """Return how many nodes of each kind an autoscaler may start in addition to the alive ones."""
    running = Counter(node.group for node in alive if node.group)
    return [
        replace(kind, count=kind.count - running[kind.group])
        for kind in scalable
        if kind.count > running[kind.group]
    ]


def resolve_placement(job: JobConfig) -> Placement:
    """Resolve what is auto. Raises ClusterError at once if the cluster cannot run the workers, and
    JobError if the job requires what is for GPUs and they compute on the CPU.
    """
    alive = alive_nodes()
    possible = [*alive, *startable_nodes(scalable_nodes(), alive)]
    num_gpus = sum(n.resources.get("GPU", 0.0) * n.count for n in possible)
    bundle = dict(job.ray.resources_per_worker or {})
    if not bundle:
        bundle = {"GPU": 1.0} if num_gpus >= 1 and not job.parallel.use_cpu else {"CPU": 1.0}
    use_gpu = bundle.get("GPU", 0.0) > 0
    if not use_gpu:
        reason = "no worker has a GPU"
        refuse_without_graph(job, reason)
        if job.parallel.fsdp_collectives == "copies":
            fix = "set fsdp_collectives: auto"
            raise JobError("fsdp_collectives: copies, but there is nothing to copy", reason, fix)
    workers = job.ray.ray_num_workers
    if workers == "auto":
        workers = int(num_gpus / bundle["GPU"]) if use_gpu else CPU_WORKERS
    most = max(workers if isinstance(workers, int) else max(workers), 1)
    note = describe_request(job, most, bundle)
    placement = Placement(most, bundle, use_gpu, note, numbers=numbers(job))
    _refuse_misfit(job, placement, possible)
    return placement


def one_worker() -> Placement:
    """Return the placement of the smallest job: one GPU, or one CPU if no node has a GPU."""
    use_gpu = any(node.resources.get("GPU", 0.0) >= 1 for node in alive_nodes())
    return Placement(1, {"GPU": 1.0} if use_gpu else {"CPU": 1.0}, use_gpu, "")


def describe_request(job: JobConfig, workers: int, bundle: Mapping[str, float]) -> str:
    """Return in a sentence what the job requests from the cluster."""
    reserved = " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())
    text = f"{plural(workers, 'worker')}, {reserved} each"
    if several := numbers(job):
        text = f"{' or '.join(map(str, several))} workers as nodes come and go, {reserved} each"
    if "GPU" not in bundle and job.ray.resources_per_worker is None:
        text += " (use_cpu: true)" if job.parallel.use_cpu else " (the cluster has no GPU)"
    return text


def _refuse_misfit(job: JobConfig, placement: Placement, possible: Sequence[Node]) -> None:
    strategy = job.ray.placement_strategy
    workers = num_fitting(possible, placement, strategy)
    if workers >= placement.fewest:
        return
    nodes = (f"  {n.count} x {n.address}: {_describe(n.resources)}" for n in possible)
    found = [placement.request(strategy), f"there is room for {workers}:", *nodes]
    fix = f"set ray_num_workers to {workers} or less, " if workers else ""
    fix += "change resources_per_worker, or add nodes"
    raise ClusterError("The cluster has no room for this job", "\n".join(found), fix)


def num_fitting(nodes: Sequence[Node], placement: Placement, strategy: str) -> int:
    """Return how many of the workers fit on these nodes together, under a placement strategy."""
    per_node = [
        min(node.num_fitting(placement.bundle), placement.num_workers)
        for node in nodes
        for _ in range(node.count)
    ]
    if strategy == "STRICT_PACK":
        return max(per_node, default=0)
    return sum(map(bool, per_node)) if strategy == "STRICT_SPREAD" else sum(per_node)


def _describe(resources: Mapping[str, float]) -> str:
    amounts = [f"{resources[k]:g} {k}" for k in ("GPU", "CPU") if k in resources]
    types = [k for k in resources if k.startswith(ACCELERATOR)]
    return ", ".join([*amounts, *types]) or "nothing"


def free_by_node() -> Mapping[str, Mapping[str, float]]:
    """Return node id -> its free resources."""
    # Private until Ray has a public form (2.60: ray.available_resources has no nodes).
    return dict(ray._private.state.available_resources_per_node())


def free_resources(placement: Placement) -> Counter[str]:
    """Return the sum of the usable nodes' free resources."""
    total: Counter[str] = Counter()
    for node_id, resources in free_by_node().items():
        if node_id not in placement.avoided:
            total.update(resources)
    return total


def _missing(placement: Placement) -> str:
    """Return the resources that the fewest workers need and that are not free."""
    free, fewest = free_resources(placement), placement.fewest
    lacking = {name: fewest * amount - free[name] for name, amount in placement.bundle.items()}
    return ", ".join(f"{amount:g} {name}" for name, amount in lacking.items() if amount > 1e-6)


def wait_for_room(
    placement: Placement,
    say: Callable[[str], None],
    poll_s: float = 2.0,
    every_s: float = 30.0,
    is_stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Wait until the workers' resources are free. Raises Stopped if `is_stopped` returns true."""
    last = 0.0
    while missing := _missing(placement):
        if is_stopped():
            fix = "run again with resume_from_checkpoint: true"
            raise Stopped("The run was stopped", "while it waited for room for its workers", fix)
        if time.monotonic() - last > every_s:
            last = time.monotonic()
            why = "in use by other jobs, or on nodes that are not started yet (Ctrl-C gives up)"
            say(f"waiting for {missing}: {why}")
        release_workers()  # Ray may have known of a death only now
        if scalable_nodes():
            return  # only a request for the workers makes the autoscaler start nodes
        time.sleep(poll_s)


def release_workers() -> None:
    """Remove the placement groups of controllers of this Ray job that have died.

    Ray Train does so itself only if it finds its dashboard, which fails when more than one Ray
    runs on the machine, and Ray when the whole job ends (ray 2.60, placement_group_cleaner.py); the
    next controller would then wait forever. Its public table has no creators.
    """
    if not ray.is_initialized():
        return  # asking for the job would start a Ray
    own = ray.get_runtime_context().get_job_id()
    for row in ray._private.state.state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(row)
        is_removed = group.state == PlacementGroupTableData.REMOVED
        if group.creator_actor_dead and not is_removed and group.creator_job_id.hex() == own:
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
