"""Start-up and control-plane cost of a run, by the number of CPU workers.

    python jobs/benchmarks/start_up.py [--workers 1 2 4 8 16] [--empty 1 2 4 8 16] [--out FILE]
    python jobs/benchmarks/start_up.py --preflight-nodes 1 4 16 32 64 [--out FILE]

--workers launches a tiny job through the real command for each number; --empty has Ray Train start
as many workers that import no torch, report four times and end, on the same Ray with the same
settings: what the head does for a worker is the same, and it takes seconds where torch takes
minutes of few cores. Ray's and the run's processes are sampled from /proc: CPU seconds, open files,
memory, bytes in the object store. All workers share this machine's cores, which is most of the wall
time here and none of it on a cluster, where each node starts its own; what grows with the workers
on the head alone is in `on_the_head`, a line through the empty runs' figures, and it is what
`raytrain-adv plan --workers N` extrapolates. The last part times preflight's verdicts on nodes
given as data, without Ray.

--preflight-nodes measures preflight alone, on as many Ray nodes as it names, all of them on this
machine (preflight_nodes.py), and puts it beside what the file has.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).parents[2]
EVERY_S = 1.0
"""Seconds between two samples."""
MOST_S = 180.0
"""Seconds after which a launch is ended, and no larger one is tried."""
TICK = os.sysconf("SC_CLK_TCK")
ROLES = {
    "gcs_server": "gcs_server",
    "raylet": "/raylet/raylet",
    "controller": "ray::TrainController",
    "worker": "ray::RayTrainWorker",
    "driver": "raytrain_adv.launch",
    "driver of nothing": "--one",
}
"""Role -> what its command line has in it; whatever else the launch starts is `other`."""
ON_HEAD = ("gcs_server", "raylet", "controller", "driver of nothing")
"""Roles that one process has, on the head, however many workers there are."""


@dataclass
class Seen:
    """What the processes of one role were seen to take, each at its most."""

    cpu_s: dict[int, float] = field(default_factory=dict)
    files: dict[int, int] = field(default_factory=dict)
    sockets: dict[int, int] = field(default_factory=dict)
    rss_mib: dict[int, float] = field(default_factory=dict)

    def figures(self) -> dict[str, float]:
        """Return CPU seconds of all, and open files, sockets and memory of the largest."""
        return {
            "processes": len(self.cpu_s),
            "cpu_s": round(sum(self.cpu_s.values()), 2),
            "open_files": max(self.files.values()),
            "sockets": max(self.sockets.values()),
            "rss_mib": round(max(self.rss_mib.values()), 1),
        }


def descendants(root: int) -> Iterator[int]:
    """Yield a process and all that it has started."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                children[int((entry / "stat").read_text().rpartition(")")[2].split()[1])].append(
                    int(entry.name)
                )
            except OSError:
                continue  # it has ended
    waiting = [root]
    while waiting:
        process = waiting.pop()
        yield process
        waiting += children[process]


def sample(root: int, seen: dict[str, Seen]) -> int:
    """Look at the launch's processes once; return the bytes of the object store in use."""
    stored = 0
    for process in descendants(root):
        folder = Path(f"/proc/{process}")
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            role = next((r for r, part in ROLES.items() if part in command), "other")
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            files = [os.readlink(f"{folder}/fd/{one}") for one in os.listdir(folder / "fd")]
            if role == "raylet":
                stored = mapped(folder / "smaps")
        except OSError:
            continue  # it has ended
        entry = seen[role]
        entry.cpu_s[process] = (int(stat[11]) + int(stat[12])) / TICK
        entry.files[process] = max(entry.files.get(process, 0), len(files))
        sockets = sum(one.startswith("socket:") for one in files)
        entry.sockets[process] = max(entry.sockets.get(process, 0), sockets)
        rss = int(stat[21]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        entry.rss_mib[process] = max(entry.rss_mib.get(process, 0.0), rss)
    return stored


def mapped(smaps: Path) -> int:
    """Return the resident bytes of the object store, which the raylet maps from shared memory."""
    total, inside = 0, False
    for line in smaps.read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = "plasma" in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def write_job(folder: Path, steps: int) -> Path:
    """Write the tiny job and its data; return its file."""
    rows = [
        {"instruction": f"Count to {n % 9 + 1}.", "input": "", "output": f"{n} " * (n % 9 + 1)}
        for n in range(64)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    job = {
        "model_name_or_path": str(ROOT / "jobs/models/tiny-llama"),
        "train_from_scratch": True,
        "finetuning_type": "full",
        "bf16": False,
        "use_cpu": True,
        "dataset": str(folder / "rows.json"),
        "cutoff_len": 64,
        "tokenized_path": str(folder / "tokenized"),
        "max_steps": steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "export_model": False,
        "num_sample_answers": 0,
        "disable_gradient_checkpointing": True,
    }
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    return file


def launched(job: Path, workers: int, most_s: float) -> dict[str, Any] | None:
    """Launch the job on `workers` workers; return its figures, or none where it took too long."""
    out = job.parent / f"out_{workers}"
    keys = {
        "ray_num_workers": str(workers),
        "output_dir": str(out),
        "ray_init_kwargs": json.dumps({"num_cpus": workers, "include_dashboard": False}),
    }
    command = [sys.executable, "-m", "raytrain_adv.launch", str(job)]
    command += [f"{key}={value}" for key, value in keys.items()]
    watched = watch(command, job.parent / f"log_{workers}", most_s)
    if watched is None:
        return None
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    first = next(row["time"] for row in rows if row.get("event") == "first_step")
    report = json.loads((out / "report.json").read_text())
    return {
        "to_first_step_s": round(first - watched.pop("began"), 1),
        "timeline_s": {name: round(s, 2) for name, s in report["timeline"].items()},
        **watched,
    }


def empty(folder: Path, workers: int, most_s: float) -> dict[str, Any] | None:
    """Have Ray Train start workers that do nothing; return the figures, or none as above."""
    command = [sys.executable, __file__, "--one", str(workers), "--out", str(folder / "storage")]
    watched = watch(command, folder / f"log_empty_{workers}", most_s)
    return None if watched is None else {k: v for k, v in watched.items() if k != "began"}


def train_nothing(workers: int, storage: str) -> None:
    """Be the driver of `empty`."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from raytrain_adv.driver.cluster.connect import LOCAL_SETTINGS, RAY_SETTINGS

    os.environ |= {**RAY_SETTINGS, **LOCAL_SETTINGS, "RAY_TRAIN_ENABLE_STATE_TRACKING": "0"}
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "300"  # few cores, other work on them
    ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False)

    def nothing() -> None:
        for step in range(4):
            ray.train.report({"step": step})

    DataParallelTrainer(
        nothing,
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(name=f"empty_{workers}", storage_path=storage),
    ).fit()


def watch(command: list[str], log_file: Path, most_s: float) -> dict[str, Any] | None:
    """Run a command and sample it; return its figures, or none where it took too long."""
    # Sockets' paths must be short.
    temporary = Path(tempfile.mkdtemp(prefix="su", dir="/tmp"))
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "RAY_TMPDIR": str(temporary),
        "RAY_AUTH_MODE": "disabled",  # or Ray writes a token into the home folder
        "OMP_NUM_THREADS": "1",
    }
    seen: dict[str, Seen] = defaultdict(Seen)
    began, stored = time.time(), 0
    with log_file.open("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            stored = max(stored, sample(process.pid, seen))
            if time.time() - began > most_s:
                process.terminate()
            time.sleep(EVERY_S)
        log.seek(0)
        output = log.read()
    wall = time.time() - began
    shutil.rmtree(temporary, ignore_errors=True)
    if wall > most_s:
        return None
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed\n{output[-3000:]}")
    return {
        "began": began,
        "wall_s": round(wall, 1),
        "object_store_bytes": stored,
        "by_role": {role: one.figures() for role, one in seen.items()},
    }


def lines(runs: dict[int, dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return role -> figure -> the line through it over the workers: at none, and per worker."""
    counts = sorted(runs)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for role in ON_HEAD:
        found[role] = {}
        for name in ("cpu_s", "open_files", "sockets", "rss_mib"):
            values = [runs[n]["by_role"][role][name] for n in counts]
            slope, at_none = np.polyfit(counts, values, 1)
            found[role][name] = {"base": round(at_none, 3), "per_worker": round(slope, 4)}
    return found


def verdicts(count: int) -> dict[str, float]:
    """Return the seconds that preflight takes to judge `count` nodes of 8 H100 that have answered;
    what they answer is given.
    """
    from raytrain_adv.config import load
    from raytrain_adv.driver.cluster.nodes import Node, Placement
    from raytrain_adv.driver.preflight import table
    from raytrain_adv.driver.preflight import verdicts as preflight
    from raytrain_adv.transforms.applied import Transforms
    from tests.readings import H100, node_with

    with tempfile.TemporaryDirectory() as folder:
        job = load(str(write_job(Path(folder), 1)), ["output_dir=out", "use_cpu=false", "fp8=true"])
    resources = {"GPU": 8.0, "CPU": 8.0, "accelerator_type:H100": 1.0}
    nodes = [
        Node(f"10.0.{n // 250}.{n % 250}", resources, node_id=f"{n:056x}") for n in range(count)
    ]
    placement = Placement(8 * count, {"GPU": 1.0, "CPU": 1.0}, True, "")
    reading = node_with(H100, num_gpus=8)
    start = time.perf_counter()
    judged = [preflight.judge(placement, Transforms(job), node, reading) for node in nodes]
    found = preflight.compare_versions(judged, True)
    table.render(found)
    seconds = time.perf_counter() - start
    if len(found.accepted) != count:
        raise SystemExit(f"{count - len(found.accepted)} of {count} simulated nodes were refused")
    return {"nodes": count, "verdicts_and_table_s": round(seconds, 4)}


def preflight_nodes(counts: list[int], most_s: float, out: Path | None) -> None:
    """Measure preflight on so many Ray nodes; print it, and put it into the file."""
    from preflight_nodes import of_counts

    figures = json.loads(out.read_text()) if out is not None and out.is_file() else {}
    runs: list[dict[str, Any]] = []
    figures["preflight_on_nodes"] = {
        "date": str(date.today()),
        "command": command_line(),
        "cores": len(os.sched_getaffinity(0)),
        "note": "All nodes on this machine: their workers' starts queue for its cores, as they do "
        "not on a cluster, and with whatever else it does (load). gib is of all nodes.",
        "runs": runs,
    }
    with tempfile.TemporaryDirectory(prefix="start_up_") as folder:
        for run in of_counts(counts, write_job(Path(folder), 1), most_s):
            print(json.dumps(run), flush=True)
            runs.append(run)
            if out is not None:
                out.write_text(json.dumps(figures, indent=1) + "\n")


def main() -> None:
    """Launch, fit, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--empty", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--preflight-nodes", type=int, nargs="+", help="measure preflight alone")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--most-s", type=float, default=MOST_S, help="end a launch after")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.one is not None:
        train_nothing(options.one, str(options.out))
        return
    if options.preflight_nodes:
        preflight_nodes(options.preflight_nodes, options.most_s, options.out)
        return
    from raytrain_adv.hardware import package_versions

    verdicts(1)  # imports what the rules need
    folder = Path(tempfile.mkdtemp(prefix="start_up_"))
    figures: dict[str, Any] = {
        "date": str(date.today()),
        "command": command_line(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {k: v for k, v in package_versions().items() if v is not None},
        "preflight_without_ray": [verdicts(n) for n in (1, 64, 512)],
        "note": "Ray without its dashboard. Wall seconds are those of a machine with other work "
        "(load); CPU seconds, files, sockets and bytes are not.",
        "ended": [],
        "runs": {},
        "empty": {},
    }
    job = write_job(folder, options.steps)
    for kind, counts in (("empty", options.empty), ("runs", options.workers)):
        for workers in counts:
            if kind == "empty":
                found = empty(folder, workers, options.most_s)
            else:
                found = launched(job, workers, options.most_s)
            if found is None:
                ended = f"{kind}, {workers} workers: more than {options.most_s:g} s, ended"
                figures["ended"] = [*figures["ended"], ended]
                print(ended, flush=True)
                break
            figures[kind][workers] = {**found, "load": round(os.getloadavg()[0], 1)}
            print(f"{kind}, {workers} workers: {found['wall_s']} s", flush=True)
            write(figures, options.out)
    shutil.rmtree(folder, ignore_errors=True)
    write(figures, options.out)
    print(json.dumps(figures, indent=1))


def command_line() -> str:
    """Return the command as the record has it."""
    return " ".join(["python jobs/benchmarks/start_up.py", *map(shown, sys.argv[1:])])


def shown(argument: str) -> str:
    """Return an argument as the record has it, without the place of a file."""
    return "FILE" if argument.endswith(".json") else argument


def write(figures: dict[str, Any], out: Path | None) -> None:
    """Put the lines through what there is with it, and write it."""
    if len(figures["empty"]) > 1:
        figures["on_the_head"] = lines(figures["empty"])
    if out is not None:
        out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
