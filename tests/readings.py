"""Readings of nodes as data, for tests of preflight."""

from __future__ import annotations

from raytrain_adv.driver.preflight.probe import GpuReading, Reading
from raytrain_adv.hardware import package_versions
from raytrain_adv.text import GIB

CAPABILITIES = {
    "NVIDIA H100 80GB HBM3": (9, 0),
    "NVIDIA A100-SXM4-80GB": (8, 0),
    "NVIDIA H200": (9, 0),
}
H100, A100, H200 = CAPABILITIES


def node_with(
    gpu: str = "", num_gpus: int = 2, gib: int = 79, free_gib: int | None = None, **versions: str
) -> Reading:
    """Return the reading of a node with these GPUs; keywords are versions that differ from those
    here.
    """
    free = (gib if free_gib is None else free_gib) * GIB
    gpus = (GpuReading(gpu, CAPABILITIES[gpu], gib * GIB, free),) * num_gpus if gpu else ()
    return Reading(
        gpus=gpus,
        gpu_error="" if gpus else "NVML: NVML Shared Library Not Found",
        driver_version="580.95.05" if gpus else None,
        cuda_version="13.0" if gpus else None,
        num_cores=8,
        host_memory_bytes=512 * GIB,
        host_free_bytes=500 * GIB,
        versions={**package_versions(), **versions},
    )


def without(package: str, reading: Reading) -> Reading:
    """Return the reading of a node that lacks a package."""
    return Reading(**{**vars(reading), "versions": {**reading.versions, package: None}})
