"""What a job asks for under kernel_name is planned without running it, or refused."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from transformers.dependency_versions_table import deps

from raytrain_adv import hardware
from raytrain_adv.errors import ClusterError, JobError
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.hub_kernels import HubKernels
from tests.conftest import ROOT
from tests.kernel_folders import ACTIVATION, layers, refusal, write_kernel
from tests.tiny_models import job_for

CPU = hardware.detect("cpu")
GPU = replace(
    CPU,
    device_type="cuda",
    device_name="NVIDIA H200",
    cuda_version="13.0",
    versions={**CPU.versions, "torch": "2.11.0+cu130"},
)


def test_planning_runs_no_code_of_a_kernel(make, tmp_path):
    folder = write_kernel(tmp_path / "k", "import there_is_no_such_package\n" + ACTIVATION)
    job, model = make(str(folder))
    assert Transforms(job).plan(model, CPU)["kernels"].changes


def test_a_layer_not_marked_for_compile_is_refused_under_torch_compile(install, mine):
    named = layers(mine, RMSNorm="Unmarked")
    assert len(install(named)[1].changes) == 5
    message = refusal(install, named, torch_compile=True)
    assert "can_torch_compile" in message and "torch_compile is on" in message


def test_under_torch_compile_the_plan_reports_what_a_kernel_costs(make, mine):
    job, model = make(str(mine), torch_compile=True)
    notes = " ".join(Transforms(job).plan(model, CPU)["kernels"].notes)
    assert "may be slower than with use_kernels: false" in notes


def test_an_unmarked_layer_of_a_whole_kernel_is_left_out_by_name(make, tmp_path):
    text = (
        ACTIVATION + "\n\nclass RMSNorm(nn.Module):\n    def forward(self, x):\n        return x\n"
    )
    folder = write_kernel(tmp_path / "both", text)
    job, model = make(str(folder), torch_compile=True)
    plan = Transforms(job).plan(model, CPU)["kernels"]
    assert not any("norm" in fqn for fqn in plan.changes)
    assert any(note.startswith("left out of both@") and "RMSNorm" in note for note in plan.notes)
    assert any("can_torch_compile" in reason for reason in plan.skipped.values())


def test_an_unknown_site_is_named_with_those_there_are(make, mine):
    message = refusal(plan_with(make), layers(mine, RotaryEmbeding="RMSNorm"))
    assert "no modules for RotaryEmbeding" in message and "RMSNorm, SiLU, SwiGLUMLP" in message


def plan_with(make):
    def plan(*args, **keys):
        job, model = make(*args, **keys)
        return Transforms(job).plan(model, CPU)

    return plan


def test_a_kernel_that_fits_nowhere_is_refused(make, mine):
    message = refusal(plan_with(make), str(mine), kind="gpt2")
    assert "is enabled but would not replace any module" in message
    assert "the model has modules for NewGELU" in message


def test_two_kernels_for_one_module_are_refused_by_name(make, mine, silu):
    both = [layers(mine, SwiGLUMLP="SwiGLUMLP"), layers(silu, SwiGLUMLP="Silu")]
    message = refusal(plan_with(make), both)
    assert "two kernel layers are named for model.layers.0.mlp" in message
    assert "mine@" in message and "act@" in message


def test_an_activation_inside_an_mlp_that_is_replaced_has_two_owners(make, mine, silu):
    both = [layers(mine, SwiGLUMLP="SwiGLUMLP"), layers(silu, SiLU="Silu")]
    assert "two kernel layers are named for" in refusal(plan_with(make), both)
    assert "two kernel layers are named for" in refusal(plan_with(make), both[::-1])


def test_a_missing_folder_and_a_missing_build_are_refused_before_a_worker(make, tmp_path):
    for folder in ("/nowhere/kernel", str(tmp_path / "gone")):
        assert "there is no kernel folder" in refusal(plan_with(make), folder)
    folder = write_kernel(tmp_path / "gpu", variant="torch-cuda")
    message = refusal(plan_with(make), str(folder), use_cpu=True)
    assert "has no build for PyTorch" in message and "it has torch-cuda" in message


def test_a_plan_made_without_the_gpu_shows_what_a_run_there_would_do(make, tmp_path):
    folder = write_kernel(tmp_path / "gpu", variant="torch-cuda")
    job, model = make(layers(folder, RMSNorm="RMSNorm"))
    plan = Transforms(job).plan(model, CPU)["kernels"]
    assert len(plan.changes) == 5
    assert any("a run here would be refused" in note for note in plan.notes)
    assert "has no build for PyTorch" in refusal(Transforms(job).fetch, CPU, print)
    Transforms(job).fetch(GPU, print)
    assert not any("refused" in note for note in Transforms(job).plan(model, GPU)["kernels"].notes)


def test_a_folder_that_changed_since_the_run_began_is_told_and_not_taken(make, mine):
    job, model = make(layers(mine, RMSNorm="RMSNorm"))
    Transforms(job).fetch(CPU, print)
    before = Transforms(job).plan(model, CPU)["kernels"]
    file = mine / "build" / "torch-cpu" / "layers.py"
    file.write_text(file.read_text() + "\nCHANGED = True\n")
    plan = Transforms(job).plan(model, CPU)["kernels"]
    assert plan.changes == before.changes
    assert any("has changed since this run began" in note for note in plan.notes)


def test_a_folder_of_one_build_is_checked_like_any_other(make, tmp_path):
    write_kernel(tmp_path / "gpu", variant="torch-cuda")
    direct = str(tmp_path / "gpu" / "build" / "torch-cuda")
    assert "has no build for" in refusal(plan_with(make), direct, use_cpu=True)


def test_a_kernel_that_needs_other_kernels_is_refused(make, tmp_path):
    folder = write_kernel(tmp_path / "k", **{"kernel-depends": ["org/other"]})
    assert "needs other kernels" in refusal(plan_with(make), str(folder))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("torch", "installed package"),
        ("json", "installed package"),
        ("my kernel", "no name in Python"),
        (7, "cannot be read"),
    ],
)
def test_an_id_that_python_has_for_something_else_is_refused(make, tmp_path, name, says):
    """Loading it would put it in torch's place, and end the process."""
    folder = write_kernel(tmp_path / "k", id=name)
    assert says in refusal(plan_with(make), str(folder))


@pytest.mark.parametrize("kind", ["link to nothing", "link to itself", "pipe"])
def test_what_is_no_file_in_a_build_is_refused_by_its_path(make, tmp_path, kind):
    folder = write_kernel(tmp_path / "k")
    odd = folder / "build" / "torch-cpu" / "odd"
    {
        "link to nothing": lambda: odd.symlink_to("/nowhere/at/all"),
        "link to itself": lambda: odd.symlink_to(odd.parent),
        "pipe": lambda: os.mkfifo(odd),
    }[kind]()
    message = refusal(plan_with(make), str(folder))
    assert "has an entry that is not a file" in message and str(odd) in message


def test_alone_it_is_ligers_norm_on_a_gpu_and_reports_why_it_is_nothing_elsewhere(make):
    job, model = make()
    plan = Transforms(job).plan(model, CPU)["kernels"]
    assert not plan.changes and "needs a GPU" in plan.notes[0]
    compiled, model = make(torch_compile=True)
    plan = Transforms(compiled).plan(model, GPU)["kernels"]
    assert not plan.changes and "cannot be compiled" in plan.notes[0]
    job, model = make()
    message = refusal(Transforms(job).plan, model, GPU)
    assert "kernels-community/liger-kernels cannot be read from the Hub" in message


def test_a_machine_without_the_kernels_package_is_refused():
    for version in (None, "0.13.0"):
        facts = replace(CPU, versions={"kernels": version})
        with pytest.raises(ClusterError, match="needs the package kernels"):
            HubKernels(use_kernels=True).check(facts)
    HubKernels(use_kernels=True).check(CPU)


@pytest.mark.parametrize(
    ("keys", "changes_nothing"),
    [
        ({"flash_attn": "hub:/folder"}, True),
        ({"flash_attn": "hub:./folder", "use_kernels": True, "kernel_name": "/folder"}, True),
        ({"use_kernels": True, "kernel_name": [{"path": "/folder"}, "/other"]}, True),
        ({"flash_attn": "hub:me/attention"}, False),
        ({"use_kernels": True}, False),
        ({"use_kernels": True, "kernel_name": ["/folder", "me/norm"]}, False),
        ({"flash_attn": "hub:/folder", "use_kernels": True}, False),
    ],
)
def test_trust_without_a_kernel_of_the_hub_is_said_to_change_nothing(
    checkpoints, tmp_path, keys, changes_nothing
):
    notes = job_for(checkpoints("llama"), tmp_path, kernels_trust=["me"], **keys).notes
    said = "kernels_trust: ['me'] has no effect: no kernel of the Hub is used"
    assert (said in notes) == changes_nothing


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"kernel_name": "kernels-community/activation"}, "its feature is off"),
        ({"use_kernels": True, "kernel_name": {"layers": {"a": "b"}}}, "by repo or by path"),
        ({"use_kernels": True, "kernel_name": {"path": "/k", "version": 1}}, "which has no vers"),
        (
            {"use_kernels": True, "kernel_name": {"repo": "a/b", "version": 1, "revision": "x"}},
            "keep one of them",
        ),
        ({"use_kernels": True, "kernel_name": "activation"}, "neither a folder nor a name"),
        ({"use_kernels": True, "kernel_name": {"rep": "a/b"}}, "rep: extra inputs are not"),
        (
            {"use_kernels": True, "kernel_name": ["a/b", {"repo": "a/b", "version": "one"}]},
            "version: input should be a valid integer",
        ),
        ({"use_kernels": True, "kernel_name": []}, "kernel_name: [] is not accepted"),
        ({"use_kernels": True, "kernel_name": "/" + 300 * "k"}, "is not a path"),
        ({"use_kernels": True, "kernel_name": "~nobody-here/k"}, "is not a path"),
        ({"use_kernels": True, "kernels_lock": "/" + 300 * "k"}, "kernels_lock"),
    ],
)
def test_keys_that_name_no_kernel_are_refused_on_loading(checkpoints, tmp_path, keys, says):
    with pytest.raises(JobError) as caught:
        job_for(checkpoints("llama"), tmp_path, **keys)
    assert says in str(caught.value)


def test_transformers_takes_no_kernels_from_the_hub_by_itself_with_the_tested_package():
    """Its range begins above ours (transformers 5.23: kernels>=0.18.2). Once the tested set is in
    it, transformers may load code that no key names: look at its lazy_load_kernel then."""
    pinned = next(
        line.partition("==")[2]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.startswith("kernels==")
    )
    assert Version(pinned) not in Requirement(deps["kernels"]).specifier
