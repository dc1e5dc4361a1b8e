"""The function that Ray Train runs on every worker: make a Run of Ray's context, call train()."""

import os
import time
import traceback
from collections.abc import Mapping, Set
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointConsistencyMode, CheckpointUploadMode
from ray.train.torch import get_device

from raytrain_adv.checkpoint.folders import AGAIN
from raytrain_adv.config.job import JobConfig
from raytrain_adv.driver.preflight import versions
from raytrain_adv.driver.training.console import Console
from raytrain_adv.driver.training.failures import take_restart_reason
from raytrain_adv.driver.training.prometheus import RunMetrics
from raytrain_adv.driver.watch import hang
from raytrain_adv.driver.watch.stop import DrainNotice, StopRequest, is_terminated
from raytrain_adv.errors import JobError
from raytrain_adv.export.model_folder import export_model
from raytrain_adv.imports import end_imports
from raytrain_adv.run.run import Run
from raytrain_adv.storage.storage import Storage
from raytrain_adv.text import listed
from raytrain_adv.worker.train import train

STARTS = "starts.json"
SHARED = "give a folder on a shared file system"
SHOWN_NODES = 8
LOG_POLL_S = 2.0
LAST_FRAMES = 3  # innermost frames of a worker's traceback that its error carries to the driver


class RayReporter:
    """Reports metrics and checkpoints to Ray Train, and metrics to Prometheus."""

    exported: RunMetrics | None = None  # this rank's, once the number of restarts is known

    def __init__(self, folder: Path) -> None:
        self.stop_requested = StopRequest(folder).is_set
        self.drained = DrainNotice().new
        self.termination_requested = is_terminated

    def metrics(self, row: dict[str, float]) -> None:
        """Report a logging step's metrics, for the dashboard and for a sweep."""
        if self.exported is not None:
            self.exported.take(row)
        ray.train.report({k: float(v) for k, v in row.items()})

    def checkpoint(self, storage: Storage, name: str, metrics: dict[str, float]) -> None:
        """Register the checkpoint and wait until Ray's controller has it: a kill within the
        controller's polling interval would lose it (ray 2.60).
        """
        ray.train.report(
            {k: float(v) for k, v in metrics.items()},
            checkpoint=Checkpoint(path=storage.root, filesystem=storage.filesystem),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )
        ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)


def ray_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Train on this Ray Train worker; return rank 0's figures to the driver."""
    end_imports()
    job: JobConfig = config["job"]
    if os.path.isdir(config["folder"]):
        os.chdir(config["folder"])  # relative paths in the job are relative to the driver's folder
    versions.require(config["versions"])
    storage = Storage.at(config["storage_path"])
    reporter = RayReporter(Path(config["marker"]).parent)
    run = Run(
        device=_device(config["use_gpu"]),
        storage=storage,
        attempt=config["attempt"],
        reporter=reporter,
        cpu_group=dist.new_group(backend="gloo") if dist.is_initialized() else None,
        resume=config["resume"],
    )
    hang.register(run.heartbeat)
    if run.is_main:
        _require_shared_output(job, config["marker"])
        if reason := take_restart_reason(storage.folder(run.attempt)):
            run.fault(reason)
    here = (ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())
    every: list[Any] = [here] * run.world_size
    if run.world_size > 1:
        dist.all_gather_object(every, here, group=run.cpu_group)
    run.restarts = run.broadcast(_count_start(run, dict(every)) if run.is_main else None)
    require_shared_storage(run)
    reporter.exported = RunMetrics(job, config["run"], run.rank, run.restarts)
    # Rank 0's log, which Ray's dashboard shows, has the lines of the driver's console.
    log = Console(job.output.output_dir, poll_s=LOG_POLL_S) if run.is_main else nullcontext()
    try:
        with log:
            return {**train(job, run, export_model), "restarts": run.restarts}
    except Exception as error:  # raised again, whatever it is
        # Ray Train brings the error to the driver without its traceback (ray 2.60, poll.py).
        error.add_note("".join(traceback.format_tb(error.__traceback__)[-LAST_FRAMES:]))
        raise
    finally:
        run.close()
        reporter.exported.close()


def _device(use_gpu: bool) -> torch.device:
    """Return this worker's device, after making it current and sharing the CPU cores."""
    if not (use_gpu and torch.cuda.is_available()):
        # Ray writes the number of this worker's CPUs here, after preload.py has imported PyTorch,
        # which would use each core of the host.
        number = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
        if number.isdigit() and int(number) > 0:
            torch.set_num_threads(int(number))
        return torch.device("cpu")
    found = get_device()
    device: torch.device = found[0] if isinstance(found, list) else found
    if device.type == "cuda":
        torch.cuda.set_device(device)
        local_workers = ray.train.get_context().get_local_world_size()
        torch.set_num_threads(max(1, min(8, (os.cpu_count() or 1) // local_workers)))
    return device


def describe_start(
    nodes: Mapping[str, str], before: Mapping[str, str], alive: Set[str]
) -> dict[str, str]:
    """Return the event of a start: its nodes (id -> address), those of the start `before` that are
    not `alive` any more, and a sentence.
    """
    lost = [address for node, address in before.items() if node not in alive]
    here = list(nodes.values())
    text = f"workers on {_list_nodes(here)}" + (f"; lost: {_list_nodes(lost)}" if lost else "")
    return {"message": text, "nodes": " ".join(here), "lost": " ".join(lost)}


def _list_nodes(addresses: list[str]) -> str:
    return f"node{'s' * (len(addresses) != 1)} {listed(addresses, SHOWN_NODES)}"


def _count_start(run: Run, nodes: Mapping[str, str]) -> int:
    """Return this attempt's earlier starts; each controller's death added AGAIN to its name."""
    folder = run.storage.folder(run.attempt)
    folder.make()
    launch = run.attempt.rstrip(AGAIN)
    same = {name for name in run.storage.folders() if name.rstrip(AGAIN) == launch} | {run.attempt}
    found = {name: run.storage.folder(name).read_json(STARTS) or {"starts": 0} for name in same}
    alive = {str(node["NodeID"]) for node in ray.nodes() if node["Alive"]}
    last = found[run.attempt]
    run.say(event="workers", **describe_start(nodes, last.get("nodes", {}), alive))
    folder.write_json(STARTS, {"starts": last["starts"] + 1, "nodes": dict(nodes)})
    return sum(int(one["starts"]) for one in found.values())


def require_shared_storage(run: Run, patience_s: float = 10.0) -> None:
    """Raise JobError unless this worker sees rank 0's file where checkpoints are stored."""
    end = time.monotonic() + patience_s
    while run.storage.folder(run.attempt).read_json(STARTS) is None:
        if time.monotonic() > end:
            raise JobError(
                "Checkpoints would not be on storage that the workers share",
                f"{run.storage.path(run.attempt, STARTS)}: written by rank 0, not seen by rank "
                f"{run.rank} on node {ray.util.get_node_ip_address()}",
                f"{SHARED} as output_dir, or ray_storage_path: s3://...",
            )
        time.sleep(0.5)


def _require_shared_output(job: JobConfig, marker: str) -> None:
    """Raise unless this worker can see the driver's file, so that rank 0's are not lost."""
    if not os.path.exists(marker):
        raise JobError(
            "output_dir is not on storage that the driver and the workers share",
            f"{job.output.output_dir}: written by the driver, not seen on node "
            f"{ray.util.get_node_ip_address()}",
            f"{SHARED} as output_dir; checkpoints may go to ray_storage_path: s3://...",
        )
