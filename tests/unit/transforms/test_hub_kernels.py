"""What a job asks for under kernel_name is planned, tried out, swapped and reported, or refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from raytrain_adv import hardware
from raytrain_adv.errors import ClusterError, JobError, TrainingError
from raytrain_adv.kernels import lock as locks
from raytrain_adv.kernels.swap import own_forward
from raytrain_adv.report.record import TransformReport
from raytrain_adv.transforms.apply import fetch_all, install_all, plan_all, prepare_all
from raytrain_adv.transforms.hub_kernels import HubKernels, own_lock
from raytrain_adv.worker.model import build
from tests.kernel_folders import ACTIVATION, write_kernel
from tests.tiny_models import job_for, write_checkpoint

CPU = hardware.detect("cpu")
GPU = replace(
    CPU,
    device_type="cuda",
    device_name="NVIDIA H200",
    cuda_version="13.0",
    versions={**CPU.versions, "torch": "2.11.0+cu130"},
)
FP8 = {"fp8": True, "fp8_allow_cpu": True, "fp8_min_features": 0}
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
        fetch_all(job, CPU, print)
        plans = prepare_all(job, model, CPU)
        return model, install_all(job, model, plans, torch.device("cpu"), dtype)["kernels"]

    return run


def layers(folder, **named):
    return {"path": str(folder), "layers": named}


def refusal(run, *args, **keys):
    with pytest.raises(JobError) as caught:
        run(*args, **keys)
    assert caught.value.found and caught.value.fix
    return str(caught.value)


def test_a_right_kernel_is_planned_swapped_and_reported_per_site(install, mine):
    model, plan = install(layers(mine, RMSNorm="RMSNorm"))
    norms = [fqn for fqn, m in model.named_modules() if isinstance(m, LlamaRMSNorm)]
    assert list(plan.changes) == norms and len(norms) == 5
    assert {own_forward(model.get_submodule(fqn)).__qualname__ for fqn in norms} == {
        "RMSNorm.forward"
    }
    report = TransformReport.of(plan)
    (kernel,) = report.details["kernels"]
    (became,) = report.changed_by_class
    assert became.endswith(f"LlamaRMSNorm -> mine@{locks.Locked(**kernel).at}:RMSNorm")
    assert kernel["variant"] == "torch-cpu" and set(kernel["files"]) >= {"layers.py"}
    (trial,) = report.details["trials"]
    assert trial["num_modules"] == 5 and trial["dtype"] == "float32"
    assert 0 <= trial["value_error"] < 1e-6 and 0 <= trial["gradient_error"] < 1e-6
    assert any("tried out in LlamaRMSNorm on cpu in float32" in note for note in report.notes)
    assert report.skipped_reasons["no kernel that is asked for is for SwiGLUMLP"] == 2
    json.dumps(report.model_dump(mode="json"))


def test_a_kernel_without_layers_takes_every_module_that_its_layers_fit(install, mine):
    model, plan = install(str(mine))
    kinds = {type(model.get_submodule(fqn)) for fqn in plan.changes}
    assert kinds == {LlamaRMSNorm, LlamaMLP}
    assert "Linear" not in "".join(change.after for change in plan.changes.values())


def test_two_kernels_of_one_id_are_not_mistaken_for_each_other(install, tmp_path):
    norm = write_kernel(tmp_path / "norm", id="_same_id")
    silu = write_kernel(tmp_path / "silu", ACTIVATION, id="_same_id")
    model, plan = install([layers(norm, RMSNorm="RMSNorm"), layers(silu, SwiGLUMLP="Silu")])
    assert {c.after.rpartition(":")[2] for c in plan.changes.values()} == {"RMSNorm", "Silu"}
    assert own_forward(model.model.norm).__qualname__ == "RMSNorm.forward"


def test_classes_are_as_they_were_and_no_other_module_has_a_forward_of_its_own(install, mine):
    model, plan = install(layers(mine, RMSNorm="RMSNorm"))
    own = {fqn for fqn, m in model.named_modules() if "forward" in vars(m)}
    assert own == set(plan.changes)
    assert not hasattr(LlamaRMSNorm, "kernel_layer_name")
    assert not hasattr(nn.Linear, "kernel_layer_name")


def test_planning_runs_no_code_of_a_kernel(make, tmp_path):
    folder = write_kernel(tmp_path / "k", "import there_is_no_such_package\n" + ACTIVATION)
    job, model = make(str(folder))
    assert plan_all(job, model, CPU)["kernels"].changes


def test_silu_of_the_activation_kernel_trains_with_our_gradient(install, make, silu):
    model, plan = install(str(silu), dtype=torch.bfloat16)
    assert {c.after.rpartition(":")[2] for c in plan.changes.values()} == {"Silu"}
    assert any("computes forward only; its gradient is raytrain_adv's" in n for n in plan.notes)
    assert plan.details["trials"][0]["gradient_error"] == 0.0
    plain, _ = outcome(make()[1], torch.bfloat16)
    own, gradients = outcome(model, torch.bfloat16)
    assert own == plain
    assert all(g is not None for g in gradients.values())


def outcome(model, dtype=torch.float32):
    """Give a model values that depend on names alone; return its loss and its gradients."""
    model = model.to_empty(device="cpu").to(dtype)
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values / 8 if parameter.ndim > 1 else 1 + values / 8)
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            module.inv_freq.fill_(0.5)
    ids = torch.arange(64).view(2, 32)
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("layer", ["Silu", "SiluAndMul"])
def test_each_form_of_the_gated_activation_gives_torchs_gradients(install, make, silu, layer):
    model, _ = install(layers(silu, SwiGLUMLP=layer))
    loss, gradients = outcome(model)
    expected_loss, expected = outcome(make()[1])
    assert loss == expected_loss
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "site", "layer"),
    [("gemma2", "GeGLUMLP", "GeluTanh"), ("gpt2", "NewGELU", "NewGELU")],
)
def test_gelu_is_found_gated_and_bare(install, silu, kind, site, layer):
    model, plan = install(str(silu), kind=kind)
    assert len(plan.changes) == 2
    assert all(c.after.endswith(f":{layer}") for c in plan.changes.values())
    assert all(own_forward(model.get_submodule(fqn)) for fqn in plan.changes)


def test_a_bare_activation_may_be_named_by_itself(install, silu):
    model, plan = install(layers(silu, SiLU="Silu"))
    assert all(fqn.endswith("act_fn") for fqn in plan.changes) and len(plan.changes) == 2
    assert all(g is not None for g in outcome(model)[1].values())


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        ("ForwardOnly", ("has no gradient", "cut the gradient of its input and of weight")),
        ("SaysForwardOnly", ("cannot be used here", "has_backward = False")),
        ("WrongGradient", ("does not compute what LlamaRMSNorm does", "the gradient of weight")),
        ("WrongValue", ("does not compute what LlamaRMSNorm does", "values are off")),
        ("Crashes", ("fails where it is to replace LlamaRMSNorm", "no such tile")),
        ("Stateful", ("cannot be used here", "constructor")),
        ("TwoArguments", ("fails where it is to replace LlamaRMSNorm", "missing 1 required")),
        ("Misspelt", ("has no layer Misspelt", "RMSNorm")),
    ],
)
def test_a_kernel_that_is_wrong_is_refused_by_what_is_wrong(install, mine, layer, says):
    message = refusal(install, layers(mine, RMSNorm=layer))
    assert all(part in message for part in says), message


def test_a_forward_only_kernel_without_known_gradient_names_what_it_would_cut(install, mine):
    message = refusal(install, layers(mine, SiLU="ForwardOnlySiLU"))
    assert "ForwardOnlySiLU has no gradient" in message
    assert "cut the gradient of its input and of gate_proj" in message


def test_a_kernel_that_passes_linears_by_is_refused(install, mine):
    message = refusal(install, layers(mine, LlamaMLP="Bypass"))
    assert "does not call down_proj, gate_proj, up_proj of LlamaMLP" in message
    assert "FP8, QAT and adapters" in message


@pytest.mark.parametrize("keys", [{}, FP8, {"finetuning_type": "lora"}])
def test_no_kernel_replaces_a_linear_nor_what_stands_for_one(install, mine, keys):
    message = refusal(install, layers(mine, Linear="Linear"), **keys)
    assert "may not replace" in message or "no modules for Linear" in message


@pytest.mark.parametrize("keys", [FP8, {"finetuning_type": "lora", "lora_target": "all"}])
def test_fp8_and_adapters_inside_an_mlp_are_still_called(install, silu, keys):
    model, plan = install(str(silu), dtype=torch.bfloat16, **keys)
    (mlp, *_) = [model.get_submodule(fqn) for fqn in plan.changes]
    assert type(mlp.gate_proj) is not nn.Linear
    called = []
    mlp.gate_proj.register_forward_hook(lambda *_: called.append("gate_proj"))
    outcome(model, torch.bfloat16)
    assert called == ["gate_proj"]


def test_a_bypass_is_found_on_adapters_too(install, mine):
    message = refusal(
        install, layers(mine, LlamaMLP="Bypass"), finetuning_type="lora", dtype=torch.bfloat16
    )
    assert "does not call" in message and "gate_proj.lora_A.default" in message


def test_a_layer_not_marked_for_compile_is_refused_under_torch_compile(install, mine):
    named = layers(mine, RMSNorm="Unmarked")
    assert len(install(named)[1].changes) == 5
    message = refusal(install, named, torch_compile=True)
    assert "can_torch_compile" in message and "torch_compile is on" in message


def test_under_torch_compile_the_plan_says_what_a_kernel_costs(make, mine):
    job, model = make(str(mine), torch_compile=True)
    notes = " ".join(plan_all(job, model, CPU)["kernels"].notes)
    assert "may be slower than with use_kernels: false" in notes


def test_an_unmarked_layer_of_a_whole_kernel_is_left_out_by_name(make, tmp_path):
    text = (
        ACTIVATION + "\n\nclass RMSNorm(nn.Module):\n    def forward(self, x):\n        return x\n"
    )
    folder = write_kernel(tmp_path / "both", text)
    job, model = make(str(folder), torch_compile=True)
    plan = plan_all(job, model, CPU)["kernels"]
    assert not any("norm" in fqn for fqn in plan.changes)
    assert any(note.startswith("left out of both@") and "RMSNorm" in note for note in plan.notes)
    assert any("can_torch_compile" in reason for reason in plan.skipped.values())


def test_an_unknown_site_is_named_with_those_there_are(make, mine):
    message = refusal(plan_with(make), layers(mine, RotaryEmbeding="RMSNorm"))
    assert "no modules for RotaryEmbeding" in message and "RMSNorm, SiLU, SwiGLUMLP" in message


def plan_with(make):
    return lambda *args, **keys: plan_all(*make(*args, **keys), CPU)


def test_a_kernel_that_fits_nowhere_is_refused(make, mine):
    message = refusal(plan_with(make), str(mine), kind="gpt2")
    assert "was asked for and would replace nothing" in message
    assert "the model has modules for NewGELU" in message


def test_two_kernels_for_one_module_are_refused_by_name(make, mine, silu):
    both = [layers(mine, SwiGLUMLP="SwiGLUMLP"), layers(silu, SwiGLUMLP="Silu")]
    message = refusal(plan_with(make), both)
    assert "two kernel layers are asked for in model.layers.0.mlp" in message
    assert "mine@" in message and "act@" in message


def test_an_activation_inside_an_mlp_that_is_replaced_has_two_owners(make, mine, silu):
    both = [layers(mine, SwiGLUMLP="SwiGLUMLP"), layers(silu, SiLU="Silu")]
    assert "two kernel layers are asked for" in refusal(plan_with(make), both)
    assert "two kernel layers are asked for" in refusal(plan_with(make), both[::-1])


def test_a_missing_folder_and_a_missing_build_are_refused_before_a_worker(make, tmp_path):
    for folder in ("/nowhere/kernel", str(tmp_path / "gone")):
        assert "there is no kernel folder" in refusal(plan_with(make), folder)
    folder = write_kernel(tmp_path / "gpu", variant="torch-cuda")
    message = refusal(plan_with(make), str(folder), use_cpu=True)
    assert "has no build for PyTorch" in message and "it has torch-cuda" in message


def test_a_plan_made_without_the_gpu_shows_what_a_run_there_would_do(make, tmp_path):
    folder = write_kernel(tmp_path / "gpu", variant="torch-cuda")
    job, model = make(layers(folder, RMSNorm="RMSNorm"))
    plan = plan_all(job, model, CPU)["kernels"]
    assert len(plan.changes) == 5
    assert any("a run here would be refused" in note for note in plan.notes)
    assert "has no build for PyTorch" in refusal(fetch_all, job, CPU, print)
    fetch_all(job, GPU, print)
    assert not any("refused" in note for note in plan_all(job, model, GPU)["kernels"].notes)


def test_a_folder_that_changed_since_the_run_began_is_told_and_not_taken(make, mine):
    job, model = make(layers(mine, RMSNorm="RMSNorm"))
    fetch_all(job, CPU, print)
    before = plan_all(job, model, CPU)["kernels"]
    file = mine / "build" / "torch-cpu" / "layers.py"
    file.write_text(file.read_text() + "\nCHANGED = True\n")
    plan = plan_all(job, model, CPU)["kernels"]
    assert plan.changes == before.changes
    assert any("has changed since this run began" in note for note in plan.notes)


def test_a_folder_of_one_build_is_checked_like_any_other(make, tmp_path):
    write_kernel(tmp_path / "gpu", variant="torch-cuda")
    direct = str(tmp_path / "gpu" / "build" / "torch-cuda")
    assert "has no build for" in refusal(plan_with(make), direct, use_cpu=True)


def test_a_kernel_that_needs_other_kernels_is_refused(make, tmp_path):
    folder = write_kernel(tmp_path / "k", **{"kernel-depends": ["org/other"]})
    assert "needs other kernels" in refusal(plan_with(make), str(folder))


def test_a_kernel_that_cannot_be_loaded_says_why(install, tmp_path):
    folder = write_kernel(tmp_path / "k", "import there_is_no_such_package\n" + ACTIVATION)
    message = refusal(install, str(folder))
    assert "cannot be loaded" in message and "there_is_no_such_package" in message


def test_files_that_changed_after_they_were_fetched_are_refused(make, mine):
    job, model = make(layers(mine, RMSNorm="RMSNorm"))
    fetch_all(job, CPU, print)
    plans = prepare_all(job, model, CPU)
    (copied,) = own_lock(job).parent.glob("kernels/mine-*/torch-cpu/layers.py")
    copied.write_text(copied.read_text() + "\nEVIL = 1\n")
    message = refusal(install_all, job, model, plans, torch.device("cpu"), torch.float32)
    assert "are not those in" in message and "layers.py: sha256" in message


def test_workers_load_from_output_dir_when_the_folder_is_gone(make, mine):
    job, model = make(layers(mine, RMSNorm="RMSNorm"))
    fetch_all(job, CPU, print)
    mine.rename(mine.with_name("moved"))
    plans = prepare_all(job, model, CPU)
    plan = install_all(job, model, plans, torch.device("cpu"), torch.float32)["kernels"]
    assert len(plan.changes) == 5


def test_alone_it_is_ligers_norm_on_a_gpu_and_says_why_it_is_nothing_elsewhere(make):
    job, model = make()
    plan = plan_all(job, model, CPU)["kernels"]
    assert not plan.changes and "needs a GPU" in plan.notes[0]
    compiled, model = make(torch_compile=True)
    plan = plan_all(compiled, model, GPU)["kernels"]
    assert not plan.changes and "not made to be compiled" in plan.notes[0]
    message = refusal(plan_all, *make(), GPU)
    assert "kernels-community/liger-kernels cannot be read from the Hub" in message


def test_a_machine_without_the_kernels_package_is_refused():
    for version in (None, "0.13.0"):
        facts = replace(CPU, versions={"kernels": version})
        with pytest.raises(ClusterError, match="needs the package kernels"):
            HubKernels(use_kernels=True).check(facts)
    HubKernels(use_kernels=True).check(CPU)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"kernel_name": "kernels-community/activation"}, "turned off"),
        ({"use_kernels": True, "kernel_name": {"layers": {"a": "b"}}}, "by repo or by path"),
        ({"use_kernels": True, "kernel_name": {"path": "/k", "version": 1}}, "which has no vers"),
        (
            {"use_kernels": True, "kernel_name": {"repo": "a/b", "version": 1, "revision": "x"}},
            "keep one of them",
        ),
        ({"use_kernels": True, "kernel_name": "activation"}, "neither a folder nor a name"),
        ({"use_kernels": True, "kernel_name": {"rep": "a/b"}}, "kernel_name"),
        ({"use_kernels": True, "kernel_name": []}, "kernel_name: [] is not accepted"),
        ({"use_kernels": True, "kernel_name": "/" + 300 * "k"}, "is no path"),
        ({"use_kernels": True, "kernel_name": "~nobody-here/k"}, "is no path"),
        ({"use_kernels": True, "kernels_lock": "/" + 300 * "k"}, "kernels_lock"),
    ],
)
def test_keys_that_name_no_kernel_are_refused_on_loading(checkpoints, tmp_path, keys, says):
    with pytest.raises(JobError) as caught:
        job_for(checkpoints("llama"), tmp_path, **keys)
    assert says in str(caught.value)


class Forgets(HubKernels):
    """Puts nothing in place."""

    def install(self, model, plan, job, device, dtype):
        """Do nothing."""
        return plan


class DoesMore(HubKernels):
    """Replaces one forward pass that was not planned."""

    def install(self, model, plan, job, device, dtype):
        """Do too much."""
        model.lm_head.forward = model.lm_head.forward
        return super().install(model, plan, job, device, dtype)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Forgets, "has the forward pass it had, planned mine@"),
        (DoesMore, "lm_head has another forward pass, which was not planned"),
    ],
)
def test_forward_passes_that_differ_from_the_plan_stop_the_run(make, mine, kind, says):
    job, model = make(layers(mine, RMSNorm="RMSNorm"))
    fetch_all(job, CPU, print)
    plans = prepare_all(job, model, CPU)
    keys = job.transform(HubKernels)
    others = tuple(
        kind(**keys.model_dump(exclude_unset=True)) if t is keys else t for t in job.transforms
    )
    with pytest.raises(TrainingError, match=says):
        install_all(
            replace(job, transforms=others), model, plans, torch.device("cpu"), torch.float32
        )
