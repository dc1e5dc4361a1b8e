"""The function Ray Train runs on every worker: it makes a Run out of Ray's context and calls
train().
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointConsistencyMode, CheckpointUploadMode
from ray.train.torch import get_device

from raytrain_adv.config.job import JobConfig
from raytrain_adv.driver.preflight import versions
from raytrain_adv.driver.training.failures import take_word
from raytrain_adv.driver.training.prometheus import RunMetrics
from raytrain_adv.driver.watch import hang
from raytrain_adv.driver.watch.notice import DrainNotice, termination_requested
from raytrain_adv.driver.watch.stop import AskedToStop
from raytrain_adv.errors import JobError
from raytrain_adv.export.model_folder import export_model
from raytrain_adv.run.run import Run
from raytrain_adv.storage.storage import Storage
from raytrain_adv.worker.train import train

STARTS = "starts.json"
SHOWN_NODES = 8
LAST_FRAMES = 3
"""Innermost frames of a worker's traceback that its error takes to the driver."""


class RayReporter:
    """Hands metrics and checkpoints to Ray Train, and metrics to Prometheus."""

    exported: RunMetrics | None = None
    """This rank's, once it knows its place in the run."""

    def __init__(self, folder: Path) -> None:
        self._asked = AskedToStop(folder)
        self._drain = DrainNotice()

    def metrics(self, row: dict[str, float]) -> None:
        """Report a logging step's metrics; the dashboard's and a sweep's view of the run."""
        if self.exported is not None:
            self.exported.take(row)
        ray.train.report({k: float(v) for k, v in row.items()})

    def checkpoint(self, storage: Storage, name: str, metrics: dict[str, float]) -> None:
        """Register the checkpoint and wait until Ray's controller has it.

        Without the wait a checkpoint is lost to a kill within the controller's polling interval
        (ray 2.60).
        """
        ray.train.report(
            {k: float(v) for k, v in metrics.items()},
            checkpoint=Checkpoint(path=storage.root, filesystem=storage.filesystem),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )
        ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)

    def stop_requested(self) -> bool:
        """Whether the driver was told to stop, and has left word."""
        return self._asked.now()

    def termination_requested(self) -> bool:
        """Whether this worker's process has had a SIGTERM."""
        return termination_requested()

    def drained(self) -> str:
        """Say which nodes Ray is about to lose, once for each."""
        return self._drain.new()


def ray_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Train on this Ray Train worker; return rank 0's figures to the driver."""
    job: JobConfig = config["job"]
    if os.path.isdir(config["folder"]):
        os.chdir(config["folder"])  # a relative path in the job is meant as on the driver
    versions.require(config["versions"])
    storage = Storage.at(config["storage_path"])
    device = (
        get_device() if config["use_gpu"] and torch.cuda.is_available() else torch.device("cpu")
    )
    if isinstance(device, list):
        device = device[0]
    if device.type == "cuda":
        torch.cuda.set_device(device)
        local_workers = ray.train.get_context().get_local_world_size()
        torch.set_num_threads(max(1, min(8, (os.cpu_count() or 1) // local_workers)))
    reporter = RayReporter(Path(config["marker"]).parent)
    run = Run(
        device=device,
        storage=storage,
        attempt=config["attempt"],
        reporter=reporter,
        cpu_group=dist.new_group(backend="gloo") if dist.is_initialized() else None,
        resume=config["resume"],
    )
    hang.listen(run.heartbeat)
    if run.is_main:
        _require_shared(job, config["marker"])
        if word := take_word(storage.folder(run.attempt)):
            run.fault(word)
    places = gathered(run)
    run.restarts = run.broadcast(_count_start(run, places) if run.is_main else None)
    require_shared_storage(run)
    reporter.exported = RunMetrics(job, config["run"], run.rank, run.restarts)
    try:
        return {**train(job, run, export_model), "restarts": run.restarts}
    except Exception as error:
        # Ray Train brings the error to the driver without its traceback (ray 2.60, poll.py).
        error.add_note("".join(traceback.format_tb(error.__traceback__)[-LAST_FRAMES:]))
        raise
    finally:
        run.close()
        reporter.exported.close()


def gathered(run: Run) -> dict[str, str]:
    """Return the nodes that the workers are on, id -> address, in the order of their ranks."""
    here = (ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())
    every: list[Any] = [here] * run.world_size
    if run.world_size > 1:
        dist.all_gather_object(every, here, group=run.cpu_group)
    return dict(every)


def said(places: Mapping[str, str], before: Mapping[str, str], alive: Set[str]) -> dict[str, str]:
    """Return what to tell of where the workers start: nodes, lost nodes, and a sentence.

    Args:
        places: their nodes, id -> address.
        before: those of the start before, if there was one.
        alive: ids of the cluster's nodes.
    """
    lost = [address for node, address in before.items() if node not in alive]
    nodes = list(places.values())
    text = f"workers on {_listed(nodes)}"
    if lost:
        text += f"; lost: {_listed(lost)}"
    return {"message": text, "nodes": " ".join(nodes), "lost": " ".join(lost)}


def _listed(addresses: list[str]) -> str:
    more = len(addresses) - SHOWN_NODES
    text = ", ".join(addresses[:SHOWN_NODES]) + (f" and {more} more" if more > 0 else "")
    return f"node{'s' * (len(addresses) != 1)} {text}"


def _count_start(run: Run, places: Mapping[str, str]) -> int:
    """Return how often this attempt has started before; Ray restarts all workers without telling
    them. Each death of the controller has added an r to the attempt's name.
    """
    folder = run.storage.folder(run.attempt)
    folder.make()
    launch = run.attempt.rstrip("r")
    same = {name for name in run.storage.folders() if name.rstrip("r") == launch} | {run.attempt}
    found = {name: run.storage.folder(name).read_json(STARTS) or {"starts": 0} for name in same}
    alive = {str(node["NodeID"]) for node in ray.nodes() if node["Alive"]}
    run.say(event="workers", **said(places, found[run.attempt].get("nodes", {}), alive))
    group = ray.util.get_current_placement_group()
    folder.write_json(
        STARTS,
        {
            "starts": found[run.attempt]["starts"] + 1,
            "placement_group": group.id.hex() if group is not None else None,
            "nodes": dict(places),
        },
    )
    return sum(int(one["starts"]) for one in found.values())


def require_shared_storage(run: Run, patience_s: float = 10.0) -> None:
    """Raise unless this worker sees what rank 0 has written to where checkpoints go.

    Raises:
        JobError: its part of each checkpoint would stay on its own node.
    """
    end = time.monotonic() + patience_s
    while run.storage.folder(run.attempt).read_json(STARTS) is None:
        if time.monotonic() > end:
            raise JobError(
                "Checkpoints would not be on storage that the workers share",
                f"{run.storage.path(run.attempt, STARTS)}: written by rank 0, not seen by rank "
                f"{run.rank} on node {ray.util.get_node_ip_address()}",
                "give a folder on a shared file system as output_dir, or ray_storage_path: s3://...",
            )
        time.sleep(0.5)


def _require_shared(job: JobConfig, marker: str) -> None:
    """Raise unless this worker sees the file that the driver wrote into output_dir.

    Raises:
        JobError: what rank 0 would write would stay on its node.
    """
    if not os.path.exists(marker):
        raise JobError(
            "output_dir is not on storage that the driver and the workers share",
            f"{job.output.output_dir}: written by the driver, not seen on node "
            f"{ray.util.get_node_ip_address()}",
            "give a folder on a shared file system as output_dir; checkpoints may go to "
            "ray_storage_path: s3://...",
        )
