"""A tiny model with kernels asked for, as the driver plans it and as a worker has it."""

from __future__ import annotations

import pytest
import torch

from raytrain_adv import hardware
from raytrain_adv.model.build import build
from raytrain_adv.transforms.applied import Transforms
from tests.kernel_folders import ACTIVATION, write_kernel
from tests.tiny_models import job_for, write_checkpoint

CPU = hardware.detect("cpu")
WIDE = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 96}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Tiny models by kind, each written once."""
    written = {}

    def get(kind):
        if kind not in written:
            folder = tmp_path_factory.mktemp(kind)
            written[kind] = write_checkpoint(kind, folder, **(WIDE if kind == "llama" else {}))
        return written[kind]

    return get


@pytest.fixture
def mine(tmp_path):
    return write_kernel(tmp_path / "mine")


@pytest.fixture
def silu(tmp_path):
    return write_kernel(tmp_path / "act", ACTIVATION, name="activation")


@pytest.fixture
def make(checkpoints, tmp_path):
    """Return the job and the model of these keys, kernels asked for."""

    def build_one(kernel_name=None, kind="llama", **keys):
        if kernel_name is not None:
            keys["kernel_name"] = kernel_name
        job = job_for(checkpoints(kind), tmp_path, use_kernels=True, **keys)
        return job, build(job)

    return build_one


@pytest.fixture
def install(make):
    """Do what a worker does to its model; return the model and the plan of the kernels."""

    def run(kernel_name=None, dtype=torch.float32, **keys):
        job, model = make(kernel_name, **keys)
        Transforms(job).fetch(CPU, print)
        plans = Transforms(job).prepare(model, CPU)
        return model, Transforms(job).install(model, plans, torch.device("cpu"), dtype)["kernels"]

    return run
