"""Tests that run in several processes take the GPUs in turn."""

import os

import torch


def rotated(gpus: list[str], worker: str) -> list[str]:
    """Return the GPUs as a process of xdist (gw0, gw1, ...) sees them: another one first."""
    first = int(worker.removeprefix("gw")) % len(gpus) if gpus else 0
    return gpus[first:] + gpus[:first]


if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(
        str(gpu) for gpu in range(torch.cuda.device_count())
    )
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(rotated(visible.split(","), worker))
    # Compiling starts as many processes as there are cores, in each of them.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
