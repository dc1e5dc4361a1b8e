"""Print what a node has, as one line of JSON: its GPUs by NVML, its memory, its versions.

It runs on the nodes as `python -c <this text> PACKAGE...`. The node may not have raytrain_adv, so
it uses the standard library, and NVML's bindings if it finds them. It neither creates a CUDA
context nor imports torch.
"""

import hashlib
import importlib.util
import json
import os
import platform
import re
import socket
import sys
from importlib import metadata
from pathlib import Path
from typing import Any


def nvml() -> Any:
    """Return NVML's bindings: nvidia-ml-py, or the copy inside Ray without importing Ray.

    Raises:
        ImportError: when there is neither.
    """
    if importlib.util.find_spec("pynvml") is not None:
        return importlib.import_module("pynvml")
    ray = importlib.util.find_spec("ray")
    path = Path(str(ray and ray.origin)).parent / "_private/thirdparty/pynvml/pynvml.py"
    spec = importlib.util.spec_from_file_location("pynvml", path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise ImportError("nvidia-ml-py is not installed")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def decode(value: object) -> str:
    """Return a string from NVML, which old bindings return as bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)


def gpus_by_nvml() -> dict[str, object]:
    """Return the GPUs or their MIG slices; `gpu_error` is the reason if there are none."""
    found: dict[str, object] = {"gpus": [], "driver_version": None, "gpu_error": ""}
    try:
        lib = nvml()
    except ImportError as error:
        return {**found, "gpu_error": str(error)}
    try:
        lib.nvmlInit()
        found["driver_version"] = decode(lib.nvmlSystemGetDriverVersion())
        handles = [
            lib.nvmlDeviceGetHandleByIndex(index) for index in range(lib.nvmlDeviceGetCount())
        ]
        found["gpus"] = [gpu for handle in handles for gpu in devices(lib, handle)]
    except lib.NVMLError as error:
        found["gpu_error"] = f"NVML: {error}"
    return found


def devices(lib: Any, handle: Any) -> list[dict[str, object]]:
    """Return the devices that CUDA sees of one GPU: the GPU itself, or its MIG slices."""
    capability = list(lib.nvmlDeviceGetCudaComputeCapability(handle))
    slices = mig_slices(lib, handle)
    found = []
    for part in [handle] if slices is None else slices:
        memory = lib.nvmlDeviceGetMemoryInfo(part)
        found.append(
            {
                "name": decode(lib.nvmlDeviceGetName(part)),
                "compute_capability": capability,
                "total_bytes": int(memory.total),
                "free_bytes": int(memory.free),
                "is_mig": slices is not None,
            }
        )
    return found


def mig_slices(lib: Any, handle: Any) -> list[Any] | None:
    """Return the handles of a GPU's MIG slices; None if MIG is off or not supported."""
    try:
        if lib.nvmlDeviceGetMigMode(handle)[0] != 1:
            return None
    except lib.NVMLError:
        return None
    slices = []
    for index in range(lib.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            slices.append(lib.nvmlDeviceGetMigDeviceHandleByIndex(handle, index))
        except lib.NVMLError:
            continue  # no slice at this index
    return slices


def versions(packages: list[str]) -> dict[str, object]:
    """Return package -> installed version, or None; imports none of them."""
    found: dict[str, object] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def own_package() -> tuple[str | None, str | None]:
    """Return raytrain_adv's version and a hash of its code: it may be in the job's working_dir
    without being installed, and different commits may share a version.
    """
    spec = importlib.util.find_spec("raytrain_adv")
    if spec is None or spec.origin is None:
        return None, None
    digest = hashlib.sha256()
    folder = Path(spec.origin).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return variable(Path(spec.origin), "__version__"), digest.hexdigest()[:12]


def cuda_version() -> str | None:
    """Return the CUDA version that PyTorch was built for, from its version file."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    return variable(Path(spec.origin).with_name("version.py"), "cuda")


def variable(path: Path, name: str) -> str | None:
    """Return the string that a Python file assigns to a name."""
    pattern = rf"^{name}(?:\s*:[^=]*)?\s*=\s*['\"]([^'\"]+)"
    found = re.search(pattern, path.read_text(), re.M) if path.is_file() else None
    return found.group(1) if found else None


def host_memory_bytes() -> int:
    """Return the node's memory, or the control group's limit if that is smaller."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        path = Path("/sys/fs/cgroup") / limit
        if path.is_file() and path.read_text().strip().isdigit():
            total = min(total, int(path.read_text()))
    return total


def host_free_bytes() -> int:
    """Return the available memory, also under a control group's limit; 0 if unknown."""
    meminfo = Path("/proc/meminfo")
    text = meminfo.read_text() if meminfo.is_file() else ""
    found = re.search(r"^MemAvailable:\s+(\d+)", text, re.M)
    if found is None:
        return 0
    free, group = int(found.group(1)) * 1024, Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if limit.is_file() and limit.read_text().strip().isdigit():
        used = int((group / "memory.current").read_text())
        files = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.M)
        free = min(free, int(limit.read_text()) - used + int(files.group(1) if files else 0))
    return free


def reading(packages: list[str]) -> dict[str, object]:
    """Return everything about this node."""
    own_version, code = own_package()
    return {
        **gpus_by_nvml(),
        "hostname": socket.gethostname(),
        "cuda_version": cuda_version(),
        "num_cores": len(os.sched_getaffinity(0)),
        "host_memory_bytes": host_memory_bytes(),
        "host_free_bytes": host_free_bytes(),
        "versions": {**versions(packages), "raytrain_adv": own_version},
        "code": code,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(reading(sys.argv[1:])) + "\n")
