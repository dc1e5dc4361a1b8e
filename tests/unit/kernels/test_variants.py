"""The build for the workers is chosen as the kernels package would choose it there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernels.variants import parse_variant, resolve_variant

from raytrain_adv import hardware
from raytrain_adv.kernels.variants import Target, choose, is_build, numbers

H200 = Target(torch=(2, 11), cuda=(13, 0), machine="x86_64")
CPU = Target(torch=(2, 11), cuda=None, machine="x86_64")
STABLE = "torch-stable-abi210-cu130-x86_64-linux"
BUILT = "torch211-cxx11-cu130-x86_64-linux"
EVERY = [
    STABLE,
    BUILT,
    "torch-cuda",
    "torch-cpu",
    "torch-universal",
    "torch211-cxx11-cpu-x86_64-linux",
]


@pytest.mark.parametrize(
    ("names", "target", "chosen"),
    [
        (EVERY, H200, STABLE),
        (EVERY[1:], H200, BUILT),
        (EVERY[2:], H200, "torch-cuda"),
        (["torch-cpu", "torch-universal"], H200, "torch-universal"),
        (EVERY, CPU, "torch211-cxx11-cpu-x86_64-linux"),
        (["torch-cuda", "torch-cpu"], CPU, "torch-cpu"),
        (["torch-cuda"], CPU, None),
        (["torch212-cxx11-cu130-x86_64-linux"], H200, None),
        (["torch-stable-abi212-cu130-x86_64-linux"], H200, None),
        (["torch211-cxx11-cu128-x86_64-linux"], H200, None),
        (["torch211-cxx11-cu132-x86_64-linux"], H200, None),
        (["torch211-cxx11-cu130-aarch64-linux"], H200, None),
        (["torch211-cxx11-rocm64-x86_64-linux", "src", "nonsense"], H200, None),
        (["torch-stable-abi29-cu130-x86_64-linux", STABLE], H200, STABLE),
        ([], H200, None),
    ],
)
def test_the_best_build_that_fits_is_chosen(names, target, chosen):
    assert choose(names, target) == chosen


def test_for_this_machine_the_kernels_package_chooses_the_same():
    names = [*EVERY, *(name.replace("211", "213") for name in EVERY)]
    here = Target.of(hardware.detect("cpu" if torch.version.cuda is None else None))
    theirs, _ = resolve_variant([parse_variant(name) for name in names])
    assert theirs is not None
    assert choose(names, here) == theirs.variant_str


def test_a_target_is_read_off_a_machines_facts():
    facts = replace(
        hardware.detect("cpu"),
        device_type="cuda",
        cuda_version="13.0",
        versions={"torch": "2.11.0+cu130"},
    )
    assert Target.of(facts) == replace(H200, machine=Target.of(facts).machine)
    assert Target.of(replace(facts, device_type="cpu")).cuda is None


def test_names_of_builds_are_told_from_other_folders():
    assert all(is_build(name) for name in EVERY)
    assert not any(is_build(name) for name in ("src", "build", "tests", "torch_ext"))
    assert numbers("2.11.0+cu130") == (2, 11)
