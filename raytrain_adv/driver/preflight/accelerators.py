"""Nodes that an autoscaler has not started yet, by the accelerator type that they declare."""

from __future__ import annotations

from raytrain_adv.driver.preflight.probe import GpuReading, Reading
from raytrain_adv.hardware import package_versions
from raytrain_adv.text import GIB

# Ray's accelerator type -> compute capability, and its smallest memory in GiB.
# Source: NVIDIA's datasheets and its list of CUDA GPUs.
ACCELERATORS: dict[str, tuple[tuple[int, int], int]] = {
    "V100": ((7, 0), 16),
    "T4": ((7, 5), 16),
    "A100": ((8, 0), 40),
    "A100-40G": ((8, 0), 40),
    "A100-80G": ((8, 0), 80),
    "A30": ((8, 0), 24),
    "A10": ((8, 6), 24),
    "A10G": ((8, 6), 24),
    "L4": ((8, 9), 24),
    "L40S": ((8, 9), 48),
    "H20": ((9, 0), 96),
    "H100": ((9, 0), 80),
    "H800": ((9, 0), 80),
    "H200": ((9, 0), 141),
    "GH200": ((9, 0), 96),
    "B200": ((10, 0), 180),
    "GB200": ((10, 0), 180),
}


def declared_reading(accelerator: str, num_gpus: int) -> Reading | None:
    """Return a node's reading from its declared GPUs; None if their type is missing or unknown.

    Its software is assumed to be the driver's; each worker compares when it starts.
    """
    known = ACCELERATORS.get(accelerator)
    if num_gpus and known is None:
        return None
    gpus: tuple[GpuReading, ...] = ()
    if known is not None:
        capability, memory_gib = known
        size = memory_gib * GIB
        gpus = (GpuReading(f"NVIDIA {accelerator}", capability, size, size),) * num_gpus
    return Reading(gpus=gpus, versions=package_versions(), is_declared=True)
