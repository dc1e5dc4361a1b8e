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
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

CONTROL_GROUP = Path("/sys/fs/cgroup")


def origin(package: str) -> Path:
    """Return the path of a package's __init__.py; one that does not exist if it is not found."""
    spec = importlib.util.find_spec(package)
    return Path((spec and spec.origin) or os.devnull)


def nvml() -> Any:
    """Return NVML's bindings: nvidia-ml-py, or Ray's copy without importing Ray; or ImportError."""
    if importlib.util.find_spec("pynvml") is not None:
        return importlib.import_module("pynvml")
    path = origin("ray").parent / "_private/thirdparty/pynvml/pynvml.py"
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
        handles = map(lib.nvmlDeviceGetHandleByIndex, range(lib.nvmlDeviceGetCount()))
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


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Return package -> installed version, or None; imports none of them."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def own_package() -> tuple[str | None, str | None]:
    """Return raytrain_adv's version and a hash of its files: it may be in the job's working_dir
    without being installed, and different commits may share a version.
    """
    init = origin("raytrain_adv")
    if not init.is_file():
        return None, None
    digest = hashlib.sha256()
    for name, path in package_files(init.parent):
        digest.update(name.encode() + b"\0" + path.read_bytes())
    return variable(init, "__version__"), digest.hexdigest()[:12]


def package_files(folder: Path) -> list[tuple[str, Path]]:
    """Return name and path of each installed file, without what Python and editors leave there."""
    files = ((path.relative_to(folder), path) for path in folder.rglob("*") if path.is_file())
    return sorted(
        (name.as_posix(), path)
        for name, path in files
        if not any(part.startswith((".", "__pycache__")) for part in name.parts)
        and not name.name.endswith((".pyc", "~", ".orig", ".rej"))
    )


def variable(path: Path, name: str) -> str | None:
    """Return the string that a Python file assigns to a name."""
    pattern = rf"^{name}(?:\s*:[^=]*)?\s*=\s*['\"]([^'\"]+)"
    found = re.search(pattern, path.read_text(), re.M) if path.is_file() else None
    return found.group(1) if found else None


def host_memory() -> dict[str, int]:
    """Return the node's memory and how much of it is available (0 if unknown), or those under a
    control group's limit if that is smaller.
    """
    group = CONTROL_GROUP
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = number(Path("/proc/meminfo"), r"^MemAvailable:\s+(\d+)") * 1024
    old = number(group / "memory/memory.limit_in_bytes", r"(\d+)\s*$")
    limit = number(group / "memory.max", r"(\d+)\s*$")
    total = min(total, limit or total, old or total)
    if free and limit:
        used = number(group / "memory.current", r"(\d+)")
        free = min(free, limit - used + number(group / "memory.stat", r"^inactive_file (\d+)"))
    return {"host_memory_bytes": total, "host_free_bytes": free}


def num_cores(group: Path = CONTROL_GROUP) -> int:
    """Return the cores that this process may use: its affinity's, or a control group's quota of
    their time if that is less.
    """
    linux = sys.platform == "linux"
    cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    new, old = group / "cpu.max", group / "cpu"
    quota = number(new, r"^(\d+)") or number(old / "cpu.cfs_quota_us", r"^(\d+)")
    period = number(new, r" (\d+)") or number(old / "cpu.cfs_period_us", r"(\d+)")
    return min(cores, max(quota // period, 1)) if quota and period else cores


def number(path: Path, pattern: str) -> int:
    """Return the number in a file that a pattern finds; 0 if there is none."""
    found = re.search(pattern, path.read_text(), re.M) if path.is_file() else None
    return int(found.group(1)) if found else 0


def reading(packages: list[str]) -> dict[str, object]:
    """Return everything about this node."""
    own_version, code = own_package()
    return {
        **gpus_by_nvml(),
        "cuda_version": variable(origin("torch").with_name("version.py"), "cuda"),
        "num_cores": num_cores(),
        **host_memory(),
        "versions": {**versions(packages), "raytrain_adv": own_version},
        "code": code,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(reading(sys.argv[1:])) + "\n")
