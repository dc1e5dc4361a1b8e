"""What each node has: probed at once, or as an autoscaler declares a node that is not started."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytrain_adv import probe_script
from raytrain_adv.driver.cluster.connect import is_own
from raytrain_adv.driver.cluster.nodes import Node
from raytrain_adv.hardware import PACKAGES, HardwareFacts, package_versions
from raytrain_adv.text import GIB

SCRIPT = Path(probe_script.__file__)
SCRIPT_TIMEOUT_S = 20.0  # limit for a GPU driver that hangs
NODE_TIMEOUT_S = 60.0  # time for a node to unpack the job's working_dir, start a process, answer

# Compute capability -> Ray's accelerator types of it, with their smallest memory in GiB.
# Source: NVIDIA's datasheets and its list of CUDA GPUs.
ACCELERATORS = {
    (7, 0): {"V100": 16},
    (7, 5): {"T4": 16},
    (8, 0): {"A100": 40, "A100-40G": 40, "A100-80G": 80, "A30": 24},
    (8, 6): {"A10": 24, "A10G": 24},
    (8, 9): {"L4": 24, "L40S": 48},
    (9, 0): {"H20": 96, "H100": 80, "H800": 80, "H200": 141, "GH200": 96},
    (10, 0): {"B200": 180, "GB200": 180},
}


@dataclass(frozen=True)
class GpuReading:
    """A GPU or a MIG slice of one, as NVML reports it; sizes in bytes."""

    name: str
    compute_capability: tuple[int, int]
    total_bytes: int
    free_bytes: int
    is_mig: bool = False  # whether it is a MIG slice


@dataclass(frozen=True)
class Reading:
    """A node as its probe found it or, with `is_declared`, as an autoscaler declares it."""

    gpus: tuple[GpuReading, ...] = ()
    gpu_error: str = ""  # NVML's message if it found no GPUs
    driver_version: str | None = None
    cuda_version: str | None = None  # CUDA version that PyTorch was built for
    num_cores: int = 0
    host_memory_bytes: int = 0
    host_free_bytes: int = 0  # available host memory at the time of the probe; 0 if unknown
    versions: Mapping[str, str | None] = field(default_factory=dict)  # None: it is not installed
    code: str | None = None  # hash of raytrain_adv's code: two commits may share a version
    is_declared: bool = False

    def facts(self, address: str, use_gpu: bool) -> list[HardwareFacts]:
        """Return the facts that transforms check: one for each kind of GPU, or one for the CPU."""
        if not use_gpu:
            return [self._facts(address, None)]
        kinds = {(gpu.name, gpu.compute_capability, gpu.total_bytes): gpu for gpu in self.gpus}
        return [self._facts(address, gpu) for gpu in kinds.values()]

    def _facts(self, address: str, gpu: GpuReading | None) -> HardwareFacts:
        return HardwareFacts(
            device_type="cpu" if gpu is None else "cuda",
            device_name="CPU" if gpu is None else gpu.name,
            compute_capability=None if gpu is None else gpu.compute_capability,
            device_memory_bytes=self.host_memory_bytes if gpu is None else gpu.total_bytes,
            num_gpus=len(self.gpus),
            cuda_version=self.cuda_version,
            node_ip=address,
            host_memory_bytes=self.host_memory_bytes,
            num_cores=self.num_cores,
            versions=self.versions,
        )


def declared_reading(accelerator: str, num_gpus: int) -> Reading | None:
    """Return a node's reading from its declared GPUs; None if their type is missing or unknown. Its
    software is assumed to be the driver's; each worker compares when it starts.
    """
    known = [
        GpuReading(f"NVIDIA {accelerator}", capability, size, size)
        for capability, types in ACCELERATORS.items()
        if (size := types.get(accelerator, 0) * GIB)
    ]
    if num_gpus and not known:
        return None
    gpus = tuple(known * num_gpus)
    return Reading(gpus=gpus, versions=package_versions(), is_declared=True)


Read = Callable[[Sequence[Node]], Mapping[str, Reading | str]]  # node id -> reading, or why not


def read_nodes(
    nodes: Sequence[Node], timeout_s: float = NODE_TIMEOUT_S
) -> dict[str, Reading | str]:
    """Probe the nodes in parallel; the result for a lost or late node is a sentence. A probe
    reserves neither a CPU nor a GPU, so busy nodes answer too.
    """
    given = SCRIPT.read_text(), list(PACKAGES), SCRIPT_TIMEOUT_S
    if is_own():  # a node alone, which is this machine
        return {node.node_id: _get(lambda: run_script(*given)) for node in nodes}
    # Pickled by value: the node may have no raytrain_adv to import the function from.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        task = ray.remote(num_cpus=0, max_retries=0)(run_script)
        answers = {
            task.options(
                name="raytrain_adv probe",
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False),
            ).remote(*given): node.node_id
            for node in nodes
        }
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    readings: dict[str, Reading | str] = {}
    pending, end = list(answers), time.monotonic() + timeout_s
    while pending and time.monotonic() < end:
        ready, pending = ray.wait(pending, timeout=max(0.0, end - time.monotonic()))
        for answer in ready:
            readings[answers[answer]] = _get(partial(ray.get, answer))
    for answer in pending:
        ray.cancel(answer, force=True)
        readings[answers[answer]] = f"no answer within {timeout_s:g} s"
    return readings


def run_script(source: str, packages: list[str], timeout_s: float) -> str:
    """Return what the probe's script prints in its own process here. Raises RuntimeError."""
    # The script can import what a worker can: Ray adds a working_dir to sys.path only.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-c", source, *packages]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the probe was stopped after {timeout_s:g} s") from None
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1])
    return done.stdout


def parse(printed: str) -> Reading:
    """Return the reading that the script printed. Raises ValueError for other text."""
    fields: dict[str, Any] = json.loads(printed.strip().rpartition("\n")[2])
    gpus = [
        GpuReading(**{**gpu, "compute_capability": tuple(gpu["compute_capability"])})
        for gpu in fields.pop("gpus")
    ]
    return Reading(gpus=tuple(gpus), **fields)


def _get(answer: Callable[[], str]) -> Reading | str:
    try:
        return parse(answer())
    # A task's own error is of two types; the system may refuse a process that is started here.
    except (RayError, ValueError, RuntimeError, OSError) as error:
        last = str(error).strip().rpartition("\n")[2]
        return f"{type(error).__name__}: {last}"
