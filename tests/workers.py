"""Run train() on several CPU processes over gloo, without Ray."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROGRAM = """
import sys, json, os, resource
if "LARGEST_FILE" in os.environ:  # what a full disk does, without one
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LARGEST_FILE"]),) * 2)
from raytrain_adv.config import load
from raytrain_adv.export.model_folder import export_model
from raytrain_adv.worker.run import local_run
from raytrain_adv.worker.train import train
import torch
torch.set_num_threads(1)
for path in sys.argv[1:]:
    job = load(path)
    run = local_run(job)
    figures = train(job, run, export_model)
    if run.is_main:
        told = {k: figures[k] for k in ("steps", "resumed_from_step", "model_dir")}
        print("FIGURES " + json.dumps(told), flush=True)
import torch.distributed as dist
if dist.is_initialized():
    dist.destroy_process_group()
"""


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def start_workers(jobs: Sequence[Path], count: int) -> list[subprocess.Popen[str]]:
    """Start `count` ranks that run the jobs one after another; the caller waits for them."""
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    if count > 1:
        environment["WORLD_SIZE"] = str(count)
    processes = []
    for rank in range(count):
        places = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *map(str, jobs)],
                env={**environment, **places},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def run_workers(count: int, *jobs: Path) -> list[dict[str, Any]]:
    """Run the jobs on `count` ranks, one after another in the same processes (they take seconds to
    start); return rank 0's figures of each. Fails with the ranks' output."""
    processes = start_workers(jobs, count)
    outputs = [p.communicate(timeout=500)[0] for p in processes]
    failed = [
        f"rank {rank}:\n{out}"
        for rank, (p, out) in enumerate(zip(processes, outputs, strict=True))
        if p.returncode
    ]
    if failed:
        raise AssertionError("\n".join(failed))
    lines = [line for line in outputs[0].splitlines() if line.startswith("FIGURES ")]
    return [json.loads(line.removeprefix("FIGURES ")) for line in lines]


def losses(folder: Path) -> dict[int, float]:
    """Return step -> training loss, exactly as logged."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def column(folder: Path, key: str) -> list[Any]:
    """Return one key of every training row."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if row["kind"] == "train"]
