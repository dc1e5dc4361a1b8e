"""Run train() on several CPU processes over gloo, without Ray.

Processes are kept for the tests that follow: they take seconds to import torch and to find each
other, most tests less to train.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = """
import json, os, resource, sys
if "LARGEST_FILE" in os.environ:  # what a full disk does, without one
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LARGEST_FILE"]),) * 2)
import torch
import torch.distributed as dist
from raytrain_adv.config import load
from raytrain_adv.export.model_folder import export_model
from raytrain_adv.worker.run import local_run
from raytrain_adv.worker.train import train

torch.set_num_threads(1)
TOLD = ("steps", "resumed_from_step", "model_dir", "quantized_dir", "quantized_logit_difference")
for line in sys.stdin:
    for path in json.loads(line):
        job = load(path)
        run = local_run(job)
        figures = train(job, run, export_model)
        run.close()
        if run.is_main:
            told = {k: figures[k] for k in TOLD}
            print("FIGURES " + json.dumps(told), flush=True)
    print("FINISHED", flush=True)
if dist.is_initialized():
    dist.destroy_process_group()
"""
TIMEOUT_S = 500.0


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@dataclass
class Rank:
    """A process of a group, and what it has printed."""

    process: subprocess.Popen[str]
    log: Path
    read: int = 0

    def ask(self, jobs: list[str]) -> None:
        """Have it run these jobs."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(jobs) + "\n")
        self.process.stdin.flush()

    def news(self) -> str:
        """Return what it has printed since it was last asked."""
        return self.log.read_text()[self.read :]


GROUPS: dict[int, list[Rank]] = {}


def group(count: int) -> list[Rank]:
    """Return `count` ranks that wait for jobs."""
    if count not in GROUPS:
        GROUPS[count] = _started(count)
    return GROUPS[count]


def _started(count: int) -> list[Rank]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    environment["MASTER_PORT"] = str(free_port())
    if count > 1:
        environment["WORLD_SIZE"] = str(count)
    ranks = []
    for rank in range(count):
        places = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
        log = Path(tempfile.mkstemp(prefix=f"rank_{rank}_of_{count}_")[1])
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM],
                env={**environment, **places},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )
        ranks.append(Rank(process, log))
    return ranks


def stop(count: int) -> None:
    """End a group's processes."""
    for rank in GROUPS.pop(count, []):
        rank.process.kill()
        rank.process.wait()
        rank.log.unlink()


@atexit.register
def stop_all() -> None:
    """End every group with the tests."""
    for count in list(GROUPS):
        stop(count)


def run_workers(count: int, *jobs: Path) -> list[dict[str, Any]]:
    """Run the jobs on `count` ranks, one after another; return rank 0's figures of each. Fails with
    the ranks' output.
    """
    ranks = group(count)
    for rank in ranks:
        rank.ask([str(job) for job in jobs])
    deadline = time.monotonic() + TIMEOUT_S
    while not all(rank.news().endswith("FINISHED\n") for rank in ranks):
        died = any(rank.process.poll() is not None for rank in ranks)
        if died or time.monotonic() > deadline:
            time.sleep(1.0)
            output = "\n".join(f"rank {i}:\n{rank.news()}" for i, rank in enumerate(ranks))
            stop(count)
            raise AssertionError(output)
        time.sleep(0.05)
    lines = [line for line in ranks[0].news().splitlines() if line.startswith("FIGURES ")]
    for rank in ranks:
        rank.read = len(rank.log.read_text())
    return [json.loads(line.removeprefix("FIGURES ")) for line in lines]


def run_apart(job: Path) -> tuple[int, str]:
    """Run a job in a process of its own, in the environment as it is now; return its exit code and
    output.
    """
    (rank,) = _started(1)
    rank.ask([str(job)])
    assert rank.process.stdin is not None
    rank.process.stdin.close()
    code = rank.process.wait(timeout=TIMEOUT_S)
    return code, rank.news()


def losses(folder: Path) -> dict[int, float]:
    """Return step -> training loss, exactly as logged."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def column(folder: Path, key: str) -> list[Any]:
    """Return one key of every training row."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if row["kind"] == "train"]
