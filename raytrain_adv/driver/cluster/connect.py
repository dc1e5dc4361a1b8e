"""The Ray cluster: joined or started, and asked whether it can hold the job, before scheduling."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants, services
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup, remove_placement_group

from raytrain_adv.config.job import JobConfig
from raytrain_adv.config.workers import numbers
from raytrain_adv.driver.cluster.placement import Placement
from raytrain_adv.errors import ClusterError
from raytrain_adv.redaction import refuse_submitted
from raytrain_adv.text import plural

# Ray's defaults lose or hide things; each is set only where the user has not (ray 2.60).
RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a worker's death is seen in 0.5 s instead of 2 s
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # every print appears twice otherwise
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # ray_worker goes into the driver's folder
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # without it the dashboard does not list the run
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning about the coming default
    # A raylet warns of four times as many processes, which a sweep has on a machine with few cores:
    # its trials' drivers and controllers reserve none, and wait most of the time.
    "RAY_worker_maximum_startup_concurrency": str(max(os.cpu_count() or 1, 16)),
}
# On a Ray that the driver starts. Nobody takes its one node away with notice: no process need watch
# for it.
LOCAL_SETTINGS = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
# Where the number of workers may change: their places were free when it was decided on.
ELASTIC_SETTINGS = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"}
CONNECT_TIMEOUT_S = 5.0
CPU_WORKERS = 2
"""Workers that ray_num_workers: auto takes where there is no GPU."""


@dataclass(frozen=True)
class Node:
    """A node that is alive, or one that an autoscaler may still start."""

    address: str
    resources: Mapping[str, float]
    count: int = 1
    group: str = ""
    """Kind of node in an autoscaler's terms."""
    node_id: str = ""
    """Ray's id of it; empty for one that is yet to start."""
    is_draining: bool = False
    """Whether Ray is about to take it out of the cluster."""

    @property
    def accelerator(self) -> str:
        """The GPU that Ray or the cluster's configuration says it has; empty if none is named."""
        prefix = "accelerator_type:"
        return next((k.removeprefix(prefix) for k in self.resources if k.startswith(prefix)), "")

    def holds(self, bundle: Mapping[str, float]) -> int:
        """Return how many bundles fit on one such node."""
        fits = [int(self.resources.get(k, 0.0) / v + 1e-9) for k, v in bundle.items() if v > 0]
        return min(fits) if fits else 10**6


def connect(job: JobConfig | None) -> bool:
    """Join the cluster named by ray_init_kwargs or RAY_ADDRESS, or start one; return whether one
    was started.

    Raises:
        ClusterError: when the named cluster does not answer, or Ray cannot start.
        JobError: when the runtime environment that this was submitted with holds a secret.
    """
    refuse_submitted(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR))
    options: dict[str, Any] = {
        "logging_level": "ERROR",
        "log_to_driver": False,
        **((job.ray.ray_init_kwargs if job is not None else None) or {}),
    }
    # Without an address ray.init would join whatever cluster happens to run on this machine.
    address = options.setdefault("address", os.environ.get("RAY_ADDRESS") or "local")
    for name, value in _settings(options).items():
        os.environ.setdefault(name, value)
    if job is not None:
        os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(job.parallel.ddp_timeout))
        for name, value in ELASTIC_SETTINGS.items() if job.ray.ends else ():
            os.environ.setdefault(name, value)
    if ray.is_initialized():
        return False
    require_answer(str(address))
    token = Path.home() / ".ray" / "auth_token"
    had_token = token.exists()
    try:
        with _on_loopback(address == "local"), _in_a_group_of_its_own():
            ray.init(**options)
    except Exception as error:  # Ray raises bare ones, as where a node is slow to start (2.60)
        is_slow = address == "local" and "timed out" in str(error)
        raise ClusterError(
            "Ray cannot be started here"
            if address == "local"
            else "The Ray cluster cannot be joined",
            f"address: {address}; {type(error).__name__}: "
            f"{str(error).strip().partition(chr(10))[0]}",
            "check RAY_ADDRESS and ray_init_kwargs; leave both out to start Ray on this machine; "
            "for a cluster that asks for a token set RAY_AUTH_MODE=token"
            + ("; a machine with much other work may be too slow: try again" if is_slow else ""),
        ) from error
    finally:
        if not had_token and token.exists():
            token.chmod(0o600)  # Ray has made it, for everybody to read (ray 2.60)
    return bool(address == "local")


@contextmanager
def _on_loopback(is_local: bool) -> Iterator[None]:
    """Make a Ray that is started here listen on 127.0.0.1 only, unless its user says otherwise.

    Ray would listen on every interface, for nodes that might join; its own switch is for other
    systems, and read as ray is imported (ray 2.60, services.py). Remove when ray.init takes one.
    """
    before, switch = ray_constants.ENABLE_RAY_CLUSTER, ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    if not is_local or switch in os.environ:
        return (yield)
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[switch] = "0"  # for Ray's own processes, as the dashboard's
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        del os.environ[switch]


@contextmanager
def _in_a_group_of_its_own() -> Iterator[None]:
    """Start Ray's processes in another process group than the driver's.

    A SIGTERM to the driver's group, as `timeout` and batch systems send it, would end them while
    the driver waits for the run's last checkpoint; Ray sees to SIGINT alone (ray 2.60,
    services.py). They end with the driver all the same, which the kernel sees to. Remove when Ray
    does it.
    """
    started = services.ConsolePopen

    class Grouped(started):  # type: ignore[misc, valid-type] # ray is Any to mypy
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, process_group=0, **options)

    services.ConsolePopen = Grouped
    try:
        yield
    finally:
        services.ConsolePopen = started


def _settings(options: Mapping[str, Any]) -> dict[str, str]:
    """Return what to set in the environment, which Ray's processes inherit.

    Args:
        options: what ray.init is given.
    """
    if options["address"] != "local":
        return RAY_SETTINGS
    settings = {**RAY_SETTINGS, **LOCAL_SETTINGS}
    if options.get("include_dashboard") is False:
        del settings["RAY_TRAIN_ENABLE_STATE_TRACKING"]  # a process that only the dashboard asks
    return settings


def require_answer(address: str) -> None:
    """Raise unless somebody listens at a cluster's address; Ray would try for minutes.

    Args:
        address: host:port or ray://host:port; other forms, as local and auto, are left to Ray.

    Raises:
        ClusterError: within CONNECT_TIMEOUT_S.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            "The Ray cluster does not answer",
            f"address: {address}; {error}",
            "check RAY_ADDRESS and ray_init_kwargs, and that the head node runs; leave both out to "
            "start Ray on this machine",
        ) from error


def dashboard() -> str:
    """Return where the cluster's dashboard is, and what it asks for, in words."""
    url = ray._private.worker.get_dashboard_url()  # ray.init gives it only to who started Ray
    if not url:
        return "none (Ray was started without one)"
    # Ray 2.60 turns this on where it is started with no word about it in RAY_AUTH_MODE.
    asks = " (asks for the token that `ray get-auth-token` prints)"
    return f"http://{url}{asks if is_token_auth_enabled() else ''}"


def nodes() -> list[Node]:
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
    """Return the kinds of node that an autoscaler may start, with how many at most; none on a fixed
    cluster.
    """
    # Private, and the only place where Ray says it; Ray Data 2.60 reads it the same way.
    config = ray._private.state.state.get_cluster_config()
    if config is None:
        return []
    return [
        Node(
            f"autoscaled {group.name}",
            dict(group.resources),
            max(int(group.max_count), 0),
            group=str(group.name),
        )
        for group in config.node_group_configs
    ]


def still_to_start(scalable: list[Node], alive: list[Node]) -> list[Node]:
    """Return how many nodes of each kind an autoscaler may start beside those that are alive."""
    running = Counter(node.group for node in alive if node.group)
    return [
        replace(kind, count=max(kind.count - running[kind.group], 0))
        for kind in scalable
        if kind.count > running[kind.group]
    ]


def settle(job: JobConfig, started_here: bool) -> Placement:
    """Resolve ray_num_workers and resources_per_worker against the cluster, and refuse what it
    cannot hold.

    Raises:
        ClusterError: at once, with what was asked and what there is.
    """
    alive = nodes()
    scalable = still_to_start(scalable_nodes(), alive)
    num_gpus = sum(n.resources.get("GPU", 0.0) * n.count for n in [*alive, *scalable])
    bundle = dict(job.ray.resources_per_worker or {})
    if not bundle:
        bundle = {"GPU": 1.0} if num_gpus >= 1 and not job.parallel.use_cpu else {"CPU": 1.0}
    use_gpu = bundle.get("GPU", 0.0) > 0
    workers = job.ray.ray_num_workers
    if workers == "auto":
        workers = int(num_gpus / bundle["GPU"]) if use_gpu else CPU_WORKERS
    most = max(workers if isinstance(workers, int) else max(workers), 1)
    placement = Placement(
        most,
        bundle,
        use_gpu,
        started_here,
        note(job, most, bundle),
        numbers=numbers(job),
    )
    _refuse_misfit(job, placement, alive, scalable)
    return placement


def one_worker(started_here: bool) -> Placement:
    """Return what the smallest job would ask for: a GPU, or a CPU where no node has a GPU."""
    use_gpu = any(node.resources.get("GPU", 0.0) >= 1 for node in nodes())
    return Placement(1, {"GPU": 1.0} if use_gpu else {"CPU": 1.0}, use_gpu, started_here, "")


def note(job: JobConfig, workers: int, bundle: Mapping[str, float]) -> str:
    """Return what the job asks of the cluster, in a sentence."""
    reserved = " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())
    text = f"{plural(workers, 'worker')}, {reserved} each"
    if several := numbers(job):
        text = f"{' or '.join(map(str, several))} workers as nodes come and go, {reserved} each"
    if "GPU" not in bundle and job.ray.resources_per_worker is None:
        text += " (use_cpu: true)" if job.parallel.use_cpu else " (the cluster has no GPU)"
    return text


def _refuse_misfit(
    job: JobConfig, placement: Placement, alive: list[Node], scalable: list[Node]
) -> None:
    strategy = job.ray.placement_strategy
    possible = room([*alive, *scalable], placement, strategy)
    if possible >= placement.fewest:
        return
    asked = ", ".join(f"{v:g} {k}" for k, v in placement.bundle.items())
    found = [
        f"asked: {placement.asked} with {asked} each ({strategy})",
        f"there is room for {possible}:",
    ]
    found += [f"  {n.count} x {n.address}: {shown(n.resources)}" for n in [*alive, *scalable]]
    raise ClusterError(
        "The cluster cannot hold this job",
        "\n".join(found),
        (f"set ray_num_workers to {possible} or less, " if possible else "")
        + "change resources_per_worker, or add nodes",
    )


def room(nodes: Sequence[Node], placement: Placement, strategy: str) -> int:
    """Return how many of the workers these nodes can hold together, under a placement strategy."""
    per_node = [
        min(node.holds(placement.bundle), placement.num_workers)
        for node in nodes
        for _ in range(node.count)
    ]
    if strategy == "STRICT_PACK":
        return max(per_node, default=0)
    if strategy == "STRICT_SPREAD":
        return sum(1 for n in per_node if n)
    return sum(per_node)


def shown(resources: Mapping[str, float]) -> str:
    """Return a node's resources in a few words."""
    known = [f"{resources[k]:g} {k}" for k in ("GPU", "CPU") if k in resources]
    return (
        ", ".join([*known, *(k for k in resources if k.startswith("accelerator_type:"))])
        or "nothing"
    )


def free(placement: Placement) -> dict[str, float]:
    """Return the free resources of the nodes that may be used, added up."""
    total: dict[str, float] = {}
    for node_id, resources in free_on_nodes().items():
        if node_id not in placement.avoided:
            for name, amount in resources.items():
                total[name] = total.get(name, 0.0) + amount
    return total


def free_on_nodes() -> Mapping[str, Mapping[str, float]]:
    """Return node id -> its free resources."""
    # Private until Ray has a public form of it (2.60: ray.available_resources has no nodes).
    found: Mapping[str, Mapping[str, float]] = ray._private.state.available_resources_per_node()
    return found


def release(group: str) -> None:
    """Give back the placement group, named by its id in hex, of a controller that has died.

    Ray Train does so itself only where it can ask its dashboard, which it does not find when more
    than one Ray runs on the machine (ray 2.60, placement_group_cleaner.py); the next controller
    would wait for ever.
    """
    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))
