"""Swapped forward passes on two ranks under FSDP2, eager and compiled: they stay, and change no
loss that rounding does not.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel_folders import ACTIVATION, LAYERS, write_kernel
from tests.workers import losses, run_apart, run_workers

FP8 = {"fp8": True, "fp8_allow_cpu": True, "fp8_min_features": 16, "bf16": True}
# Leaves a byte beside its build for each call, also from compiled code, to which it is opaque.
COUNTED = ACTIVATION.replace(
    "def written_into(out, value):\n",
    "from pathlib import Path\n\n\n"
    "def written_into(out, value):\n"
    "    with open(Path(__file__).parents[1] / 'calls', 'ab', buffering=0) as file:\n"
    "        file.write(b'x')\n",
)


@pytest.fixture
def kernels(tmp_path) -> dict[str, object]:
    """Write a kernel for norms, and one for activations that counts its calls."""
    norm = {"path": str(write_kernel(tmp_path / "norm", LAYERS)), "layers": {"RMSNorm": "RMSNorm"}}
    activation = str(write_kernel(tmp_path / "act", COUNTED, name="activation"))
    return {"use_kernels": True, "kernel_name": [norm, activation]}


@pytest.fixture
def job(job_file, keys, tmp_path) -> Callable[..., Path]:
    """Return what writes a job of three steps on a model of one layer."""
    config = Path(keys["model_name_or_path"]) / "config.json"
    changed = {"num_hidden_layers": 1, "attention_dropout": 0.0}
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))

    def write(name: str, **keys: object) -> Path:
        same = {"max_steps": 3, "packing": True, "cutoff_len": 64}  # one shape: compiled once
        same |= {"loss_kernel": "torch"}  # the others are tried out first, by passes that count
        return job_file(f"{name}.yaml", output_dir=str(tmp_path / name), **same, **keys)

    return write


def calls(folder: Path) -> int:
    (file,) = folder.glob("kernels/act-*/calls")
    return file.stat().st_size


@pytest.mark.slow  # half a minute of compilation
def test_two_ranks_learn_by_compiled_kernels(job, kernels, tmp_path):
    run_workers(2, job("plain"), job("compiled", **kernels, torch_compile=True))
    found, expected = (list(losses(tmp_path / n).values()) for n in ("compiled", "plain"))
    assert found == pytest.approx(expected, rel=1e-5)
    assert calls(tmp_path / "compiled") == 12  # as uncompiled, below


def test_two_ranks_learn_by_kernels_in_fp8_and_with_adapters(job, kernels, tmp_path):
    (figures, *_) = run_workers(
        2,
        job("plain"),
        job("kernels", **kernels),
        job("recomputed", **kernels, disable_gradient_checkpointing=False),
        job("fp8", **FP8),
        job("fp8-kernels", **FP8, **kernels),
    )
    adapters = {
        "model_name_or_path": figures["model_dir"],
        "train_from_scratch": False,
        "finetuning_type": "lora",
        "lora_rank": 4,
    }
    run_workers(2, job("lora", **adapters), job("lora-kernels", **adapters, **kernels))

    def of(name):
        return list(losses(tmp_path / name).values())

    for name in ("kernels", "recomputed"):
        assert of(name) == pytest.approx(of("plain"), rel=1e-5), name
    assert of("recomputed") == of("kernels")
    # On each rank three times on trial, and once a step; twice where activations are recomputed.
    assert [calls(tmp_path / name) for name in ("kernels", "recomputed")] == [12, 18]
    assert of("fp8-kernels") == pytest.approx(of("fp8"), rel=5e-3)
    assert abs(of("fp8-kernels")[0] - of("kernels")[0]) / of("kernels")[0] > 1e-5  # FP8 is on
    assert of("lora-kernels") == pytest.approx(of("lora"), rel=1e-3)
    lock = json.loads((tmp_path / "kernels" / "kernels.lock.json").read_text())
    folders = [tmp_path / "kernels" / kernel["folder"] for kernel in lock["kernels"]]
    assert len(folders) == 2 and all((folder / "layers.py").is_file() for folder in folders)


def test_a_wrong_kernel_ends_the_run_on_the_worker_before_a_step(job_file, tmp_path):
    folder: Path = write_kernel(tmp_path / "mine")
    named = {"path": str(folder), "layers": {"RMSNorm": "WrongGradient"}}
    code, output = run_apart(job_file(use_kernels=True, kernel_name=named))
    assert code != 0
    assert "does not compute what LlamaRMSNorm does" in output
    assert not losses(tmp_path / "out")
