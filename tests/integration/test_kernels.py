"""Swapped forward passes on two ranks under FSDP2, eager and compiled: they stay, and change no
loss that rounding does not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.kernel_folders import ACTIVATION, LAYERS, write_kernel
from tests.workers import losses, run_apart, run_workers

FP8 = {"fp8": True, "fp8_allow_cpu": True, "fp8_min_features": 16, "bf16": True}


@pytest.fixture
def kernels(tmp_path: Path) -> dict[str, Any]:
    """Keys of a job that computes norms and MLPs by kernels."""
    norm = {"path": str(write_kernel(tmp_path / "mine", LAYERS)), "layers": {"RMSNorm": "RMSNorm"}}
    activation = str(write_kernel(tmp_path / "act", ACTIVATION, name="activation"))
    return {"use_kernels": True, "kernel_name": [norm, activation]}


def test_two_ranks_learn_the_same_with_kernels_and_without(job_file, tmp_path, kernels):
    """Eager, compiled under activation checkpointing, in FP8 and with adapters."""
    compiled = {"torch_compile": True, "disable_gradient_checkpointing": False}
    cases = {"plain": {}, "fp8": FP8, "compiled": compiled}

    def job(name, **keys):
        return job_file(f"{name}.yaml", output_dir=str(tmp_path / name), **keys)

    jobs = []
    for name, keys in cases.items():
        jobs += [job(name, **keys), job(f"{name}-kernels", **keys, **kernels)]
    (figures, *_) = run_workers(2, *jobs)
    adapters = {
        "model_name_or_path": figures["model_dir"],
        "train_from_scratch": False,
        "finetuning_type": "lora",
        "lora_rank": 4,
        "bf16": True,
    }
    run_workers(2, job("lora", **adapters), job("lora-kernels", **adapters, **kernels))
    for name in (*cases, "lora"):
        expected = list(losses(tmp_path / name).values())
        found = list(losses(tmp_path / f"{name}-kernels").values())
        rtol = 1e-5 if name in ("plain", "compiled") else 5e-3
        assert found == pytest.approx(expected, rel=rtol), name
    assert losses(tmp_path / "fp8-kernels") != losses(tmp_path / "plain-kernels")
    out = tmp_path / "plain-kernels"
    lock = json.loads((out / "kernels.lock.json").read_text())
    assert all((out / kernel["folder"] / "layers.py").is_file() for kernel in lock["kernels"])


def test_the_kernels_forward_is_what_runs_under_fsdp_and_compile(job_file, tmp_path):
    """A kernel that is off by an amount which the trial forgives, and the losses show."""
    off = LAYERS.replace(
        "return F.rms_norm(hidden_states, size, self.weight, self.variance_epsilon)",
        "return F.rms_norm(hidden_states, size, self.weight * 1.00005, self.variance_epsilon)",
        1,
    )
    folder = write_kernel(tmp_path / "off", off)
    norm = {"path": str(folder), "layers": {"RMSNorm": "RMSNorm"}}
    named = {"use_kernels": True, "kernel_name": norm}
    compiled = {"torch_compile": True, "disable_gradient_checkpointing": False}

    def job(name, **keys):
        return job_file(f"{name}.yaml", output_dir=str(tmp_path / name), **keys)

    run_workers(2, job("plain"), job("eager", **named), job("compiled", **named, **compiled))
    plain, eager = losses(tmp_path / "plain"), losses(tmp_path / "eager")
    shift = [abs(eager[step] - plain[step]) / plain[step] for step in plain]
    assert 1e-7 < shift[0] < 1e-3
    both = list(losses(tmp_path / "compiled").values())
    assert both == pytest.approx(list(eager.values()), rel=shift[0] / 10)


def test_a_wrong_kernel_ends_the_run_on_the_worker_before_a_step(job_file, tmp_path):
    folder = write_kernel(tmp_path / "mine")
    named = {"path": str(folder), "layers": {"RMSNorm": "WrongGradient"}}
    job = job_file(use_kernels=True, kernel_name=named)
    code, output = run_apart(job)
    assert code != 0
    assert "does not compute what LlamaRMSNorm does" in output
    assert not losses(tmp_path / "out")
