"""Preflight on real Ray nodes that are all on this machine: `start_up.py --preflight-nodes`.

Each node is a raylet with its agents, one CPU and the smallest object store Ray takes; none has a
GPU. Preflight is the driver's own: it settles the placement, runs a probe on every node and judges
what they say. The nodes share this machine's cores, on which their workers' starts queue; on a
cluster each node starts its own worker.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TICK = os.sysconf("SC_CLK_TCK")
STORE_BYTES = 75 * 2**20
"""The smallest object store that Ray takes. Source: ray_constants.py,
OBJECT_STORE_MINIMUM_MEMORY_BYTES."""
SOCKETS = ("raylet", "plasma_store")
REST_S = 10.0
"""Seconds for which nodes without work are watched."""
TIMEOUT_S = 600.0
"""Seconds for a node to answer: with the driver's 60 a few cores would refuse nodes that wait for
their turn."""
ROLES = (
    ("gcs_server", ("gcs_server",)),
    ("raylets", ("/raylet/raylet",)),
    ("agents", ("ray::DashboardAgent", "ray::RuntimeEnvAgent", "/agent")),
    ("workers", ("ray::", "default_worker.py")),
)
"""Role, and what its command line has in it, the first that fits; the rest is `other`."""
AT_ONCE = 2
"""Nodes that are started at the same time: Ray gives each 30 s, whatever else the cores do."""
SETTINGS = {
    "RAY_AUTH_MODE": "disabled",  # or Ray writes a token into the home folder
    # Agents report on their nodes every 5 s, which is half of two cores' time with 32 of them.
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    # Ray gives a worker 60 s to start and then starts another, which with 64 nodes on two cores
    # goes on for ever.
    "RAY_worker_register_timeout_seconds": "600",
}
"""For many nodes on one machine."""
LEAST_GIB = 2.0
"""Memory that is left to the rest of the machine."""


@dataclass(frozen=True)
class Taken:
    """CPU seconds of a process, and of its children that have ended."""

    role: str
    own_s: float
    children_s: float


def taken() -> dict[int, Taken]:
    """Return what this process and all that it has started have taken so far, by process."""
    from start_up import descendants

    found = {}
    for process in descendants(os.getpid()):
        folder = Path(f"/proc/{process}")
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        own, children = int(stat[11]) + int(stat[12]), int(stat[13]) + int(stat[14])
        found[process] = Taken(role_of(process, command), own / TICK, children / TICK)
    return found


def role_of(process: int, command: str) -> str:
    """Return what a process is to a cluster."""
    if process == os.getpid():
        return "driver"
    return next((role for role, parts in ROLES if any(p in command for p in parts)), "other")


def between(before: dict[int, Taken], after: dict[int, Taken]) -> dict[str, float]:
    """Return the CPU seconds by role; probes are the workers' children."""
    total: dict[str, float] = defaultdict(float)
    for process, now in after.items():
        then = before.get(process, Taken(now.role, 0.0, 0.0))
        total[now.role] += now.own_s - then.own_s
        if now.role == "workers":
            total["probes"] += now.children_s - then.children_s
    return {role: round(seconds, 2) for role, seconds in total.items()}


def held_gib() -> float:
    """Return the memory of all that this process has started; what several share counts once."""
    from start_up import descendants

    total = 0
    for process in descendants(os.getpid()):
        try:
            rows = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # it has ended
        total += sum(int(row.split()[1]) for row in rows if row.startswith("Pss:"))
    return total / 2**20


def started(count: int, folder: Path) -> Any:
    """Start a cluster of that many nodes; return it.

    Raises:
        MemoryError: when they do not fit this machine.
    """
    from ray.cluster_utils import Cluster

    from raytrain_adv.hardware import free_host_memory

    one = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    # Ray's own hooks for the exit are signal handlers, which threads may not set (ray 2.60).
    nodes = Cluster(initialize_head=True, head_node_args=one, shutdown_at_exit=False)

    def add(number: int) -> None:
        if free_host_memory() < LEAST_GIB * 2**30:
            raise MemoryError(f"{number} nodes leave less than {LEAST_GIB:g} GiB of this machine")
        # Ray names sockets by counting those there are, which two at once would do alike.
        sockets = {f"{kind}_socket_name": f"{folder}/{kind}{number}" for kind in SOCKETS}
        nodes.add_node(wait=False, **one, **sockets)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(add, range(1, count)))
    nodes.wait_for_nodes(timeout=120)
    return nodes


def preflight_once(job: Any, count: int) -> dict[str, Any]:
    """Run the driver's preflight on the cluster that this process has joined."""
    from raytrain_adv.driver.cluster import nodes
    from raytrain_adv.driver.preflight import probe, verdicts
    from raytrain_adv.driver.preflight import table as preflight_table
    from raytrain_adv.transforms.applied import Transforms

    before, begin = taken(), time.perf_counter()
    found = verdicts.check_nodes(
        nodes.resolve_placement(job),
        Transforms(job),
        lambda nodes: probe.read_nodes(nodes, TIMEOUT_S),
    )
    table = preflight_table.render(found)
    seconds, after = time.perf_counter() - begin, taken()
    if len(found.accepted) != count:
        raise SystemExit(table)
    cpu = between(before, after)
    return {
        "preflight_s": round(seconds, 2),
        "seconds_per_node": round(seconds / count, 3),
        "cpu_s": round(sum(cpu.values()), 2),
        "cpu_s_by_role": cpu,
        "worker_processes": sum(one.role == "workers" for one in after.values()),
    }


def measure(count: int, job_file: Path, folder: Path) -> dict[str, Any]:
    """Start the nodes, run preflight twice, end the nodes; return the figures."""
    import ray

    from raytrain_adv.config import load
    from raytrain_adv.driver.cluster import connect

    (folder / "ray").mkdir()
    os.environ |= {**connect.RAY_SETTINGS, **SETTINGS, "RAY_TMPDIR": str(folder)}
    job = load(str(job_file), [f"output_dir={folder / 'out'}", f"ray_num_workers={count}"])
    start = time.perf_counter()
    nodes = started(count, folder)
    figures: dict[str, Any] = {"nodes": count}
    figures["nodes_start_s"] = round(time.perf_counter() - start, 1)
    before = taken()
    time.sleep(REST_S)
    figures["cores_busy_at_rest"] = round(sum(between(before, taken()).values()) / REST_S, 2)
    figures["gib_at_rest"] = round(held_gib(), 2)
    ray.init(address=nodes.address, logging_level="ERROR", log_to_driver=False)
    # The first has each node start a worker, the second finds it there.
    figures["first"] = preflight_once(job, count)
    figures["again"] = preflight_once(job, count)
    figures["gib"] = round(held_gib(), 2)
    ray.shutdown()
    return figures


def of_counts(counts: Sequence[int], job_file: Path, most_s: float) -> Iterator[dict[str, Any]]:
    """Yield the figures for each number of nodes, or why there are none, which ends it."""
    for count in counts:
        # Sockets' paths must be short.
        with tempfile.TemporaryDirectory("", "pn", "/tmp", ignore_cleanup_errors=True) as folder:
            found = of_count(count, job_file, Path(folder), most_s)
        yield found
        if "ended" in found:
            return


def of_count(count: int, job_file: Path, folder: Path, most_s: float) -> dict[str, Any]:
    """Return the figures for a number of nodes, from a process of its own that has them."""
    from start_up import ROOT

    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
    }
    out = folder / "figures.json"
    command = [sys.executable, __file__, str(count), str(job_file), str(folder)]
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            process.wait(most_s)
        except subprocess.TimeoutExpired:
            return {"nodes": count, "ended": f"more than {most_s:g} s"}
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # the nodes, which are in its group
            process.wait()
        log.seek(0)
        last = log.read().strip().rpartition("\n")[2]
    if not out.is_file():
        return {"nodes": count, "ended": last}
    return {**json.loads(out.read_text()), "load": round(os.getloadavg()[0], 1)}


def main(count: int, job_file: Path, folder: Path) -> None:
    """Be the process that has the nodes; whoever started it ends them with its group."""
    (folder / "figures.json").write_text(json.dumps(measure(count, job_file, folder)))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
