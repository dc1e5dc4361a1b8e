"""Run train() on several CPU processes over gloo, without Ray.

Processes are kept for the tests that follow: most tests take less to train than these to find each
other.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raytrain_adv.config import load
from raytrain_adv.export.model_folder import export_model
from raytrain_adv.run.run import local_run
from raytrain_adv.worker.train import train
from tests.ranks import server

TOLD = (
    "proof",
    "steps",
    "resumed_from_step",
    "model_dir",
    "quantized_dir",
    "quantized_logit_difference",
)
TIMEOUT_S = 1800.0  # for ranks that wait for each other forever, whatever the machine does


@dataclass
class Rank:
    """A process of a group, and what it has printed."""

    process: BaseProcess
    jobs: Connection
    log: Path
    read: int = 0

    def ask(self, jobs: list[tuple[str, int]]) -> None:
        """Have it run these jobs; of each, its file and the port of the store where ranks meet."""
        self.jobs.send(jobs)

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
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1"}
    environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # as torchrun: no rank holds the store
    if count > 1:
        environment["WORLD_SIZE"] = str(count)
    context = server()
    ranks = []
    for rank in range(count):
        places = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
        log = Path(tempfile.mkstemp(prefix=f"rank_{rank}_of_{count}_")[1])
        answers, jobs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(answers, log, {**environment, **places}))
        process.start()
        answers.close()
        ranks.append(Rank(process, jobs, log))
    return ranks


def _store() -> dist.TCPStore:
    """Return a store at a port that it has taken: one that is only chosen may be gone."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _work(jobs: Connection, log: Path, environment: dict[str, str]) -> None:
    """Be a rank: run the jobs that come, until there will be no more."""
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    if "LARGEST_FILE" in environment:  # what a full disk does, without one
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(environment["LARGEST_FILE"]),) * 2)
    torch.set_num_threads(1)
    while True:
        try:
            asked = jobs.recv()
        except EOFError:
            break
        for path, port in asked:
            os.environ["MASTER_PORT"] = str(port)
            torch._dynamo.reset()  # what is compiled is not that of the job before
            job = load(path)
            run = local_run(job)
            figures = train(job, run, export_model)
            run.close()
            if run.is_main:
                told = {key: figures.get(key) for key in TOLD}
                told["changed"] = {n: len(p.changes) for n, p in figures["transforms"].items()}
                print("FIGURES " + json.dumps(told), flush=True)
            if dist.is_initialized():  # gloo's threads would poll until this process ends
                dist.destroy_process_group()
        print("FINISHED", flush=True)


def stop(count: int) -> None:
    """End a group's processes."""
    for rank in GROUPS.pop(count, []):
        rank.process.kill()
        rank.process.join()
        rank.jobs.close()
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
    stores = [_store() for _ in jobs]
    for rank in ranks:
        rank.ask([(str(job), store.port) for job, store in zip(jobs, stores, strict=True)])
    deadline = time.monotonic() + TIMEOUT_S
    while not all(rank.news().endswith("FINISHED\n") for rank in ranks):
        died = any(rank.process.exitcode is not None for rank in ranks)
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
    (rank,), store = _started(1), _store()
    rank.ask([(str(job), store.port)])
    rank.jobs.close()
    rank.process.join(TIMEOUT_S)
    code = rank.process.exitcode
    assert code is not None, f"not done in {TIMEOUT_S:g} s:\n{rank.news()}"
    return code, rank.news()


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's log that are whole: it may be missing, and it is being written."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def events(folder: Path, event: str) -> list[dict[str, Any]]:
    """Return the events of a kind."""
    return [row for row in rows(folder) if row.get("event") == event]


def losses(folder: Path) -> dict[int, float]:
    """Return step -> training loss, exactly as logged."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in lines if row["kind"] == "train"}


def column(folder: Path, key: str) -> list[Any]:
    """Return one key of every training row."""
    return [row[key] for row in rows(folder) if row["kind"] == "train"]
