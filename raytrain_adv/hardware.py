"""What a machine is: GPU, memory, software. Importing this imports no torch; `detect` does."""

from __future__ import annotations

import platform
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from raytrain_adv import __version__, probe_script
from raytrain_adv.text import GIB

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "torch", "torchao", "transformers", "ray", "peft", "bitsandbytes", "datasets", "triton",
    "kernels", "liger-kernel", "cut-cross-entropy", "gguf",
)  # fmt: skip


@dataclass(frozen=True)
class HardwareFacts:
    """One worker's device and the node it is on, as found; sizes in bytes."""

    device_type: Literal["cpu", "cuda"]  # what the worker computes on
    device_name: str  # name of the GPU as the driver gives it, or CPU with the processor's name
    compute_capability: tuple[int, int] | None
    """Major and minor compute capability of the GPU; None on CPU."""
    device_memory_bytes: int  # memory of the GPU, or on CPU the host memory this process may use
    num_gpus: int  # GPUs that this process sees on the node
    cuda_version: str | None
    """CUDA version that PyTorch was built for; None for a build without CUDA."""
    node_ip: str  # address of the node in its network
    host_memory_bytes: int
    """Main memory of the node, or the container's limit where that is smaller."""
    num_cores: int  # CPU cores this process may use
    versions: Mapping[str, str | None] = field(default_factory=dict)
    """Name -> version of Python, of this package and of PACKAGES; None if not installed."""

    @property
    def device_memory_gib(self) -> float:
        """Memory of the GPU (on CPU: of the host) in GiB."""
        return self.device_memory_bytes / GIB

    def describe(self) -> str:
        """Return one line for messages: node, GPUs, compute capability or cores, memory."""
        if self.compute_capability is None:
            what = f"no GPU, {self.num_cores} CPU cores"
        else:
            major, minor = self.compute_capability
            what = f"{self.num_gpus} x {self.device_name}, compute capability {major}.{minor}"
        return f"node {self.node_ip}, {what}, {self.device_memory_gib:.0f} GiB"


def detect(device: torch.device | str | None = None) -> HardwareFacts:
    """Return the facts about `device` and this node; None means the first GPU, else the CPU."""
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    host_memory = probe_script.host_memory()["host_memory_bytes"]
    name, capability, memory = f"CPU ({_processor_name()})", None, host_memory
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
        capability = (properties.major, properties.minor)
    return HardwareFacts(
        device_type="cuda" if device.type == "cuda" else "cpu",
        device_name=name,
        compute_capability=capability,
        device_memory_bytes=memory,
        num_gpus=torch.cuda.device_count(),
        cuda_version=torch.version.cuda,
        node_ip=_node_ip(),
        host_memory_bytes=host_memory,
        num_cores=probe_script.num_cores(),
        versions=package_versions(),
    )


def package_versions() -> dict[str, str | None]:
    """Return the versions of Python, of this package and of PACKAGES; none of those is imported."""
    return {**probe_script.versions(PACKAGES), "raytrain_adv": __version__}


def free_host_memory() -> int:
    """Return the free host memory within a control group's limit (man 5 proc: MemAvailable)."""
    return probe_script.host_memory()["host_free_bytes"] or 2**62  # unknown: not Linux


def _processor_name() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", path.read_text()) if path.is_file() else None
    return found.group(1).strip() if found else platform.machine()


def _node_ip() -> str:
    """Return the address this node would send from; connecting a UDP socket sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("8.8.8.8", 80))
        except OSError:
            return "127.0.0.1"  # a machine without a network
        return str(probe.getsockname()[0])


# Pattern of the device's name, and dense TFLOP/s in bf16 with float32 accumulation, with their
# source. The first match counts: special forms come first. Rates with 2:4 sparsity only are halved.
_PEAKS: tuple[tuple[str, float], ...] = (
    (r"\bH100 PCIe\b", 756.5),  # NVIDIA H100 Tensor Core GPU datasheet (PCIe)
    (r"\bH100 NVL\b", 835.5),  # NVIDIA H100 Tensor Core GPU datasheet (NVL)
    (r"\bH100\b", 989.4),  # NVIDIA H100 Tensor Core GPU datasheet (SXM)
    (r"\bH200 NVL\b", 835.5),  # NVIDIA H200 Tensor Core GPU datasheet (NVL)
    (r"\bGH200\b", 989.4),  # NVIDIA GH200 Grace Hopper Superchip datasheet
    (r"\bH200\b", 989.4),  # NVIDIA H200 Tensor Core GPU datasheet (SXM)
    (r"\bH800 PCIe\b", 756.5),  # NVIDIA H800 datasheet (PCIe)
    (r"\bH800\b", 989.4),  # NVIDIA H800 datasheet (SXM)
    (r"\bH20\b", 148.0),  # NVIDIA H20 datasheet
    (r"\bGB200\b", 2500.0),  # NVIDIA GB200 NVL72 datasheet (per GPU)
    (r"\bB200\b", 2250.0),  # NVIDIA HGX B200 datasheet (per GPU)
    (r"\bB100\b", 1750.0),  # NVIDIA HGX B100 datasheet (per GPU)
    (r"\bA100\b", 312.0),  # NVIDIA A100 Tensor Core GPU datasheet
    (r"\bA800\b", 312.0),  # NVIDIA A800 datasheet
    (r"\bA30\b", 165.0),  # NVIDIA A30 datasheet
    (r"\bA40\b", 149.7),  # NVIDIA A40 datasheet
    (r"\bA10\b", 125.0),  # NVIDIA A10 datasheet
    (r"\bL40S\b", 362.1),  # NVIDIA L40S datasheet
    (r"\bL40\b", 181.1),  # NVIDIA L40 datasheet
    (r"\bL4\b", 121.0),  # NVIDIA L4 datasheet
    (r"\bRTX 4090$", 165.2),  # NVIDIA Ada GPU Architecture whitepaper (GeForce RTX 4090)
    (r"\bRTX 3090$", 71.0),  # NVIDIA GA102 whitepaper (GeForce RTX 3090)
)


def peak_flops(gpu_name: str) -> float | None:
    """Return the FLOP/s of the GPU's published dense peak in bf16; None if unknown, as for a CPU or
    a MIG slice. MFU is always the share of this peak, also of a run in FP8.
    """
    if "MIG" in gpu_name:
        return None
    return next((bf16 * 1e12 for pattern, bf16 in _PEAKS if re.search(pattern, gpu_name)), None)
