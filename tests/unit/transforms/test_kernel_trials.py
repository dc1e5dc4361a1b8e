"""A kernel is tried out on the worker before it is trusted, put in place, and reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from raytrain_adv import hardware
from raytrain_adv.errors import TrainingError
from raytrain_adv.kernels import lock as locks
from raytrain_adv.kernels.select import read_layers
from raytrain_adv.report.parts import TransformReport
from raytrain_adv.run.run import Run, SilentReporter
from raytrain_adv.storage.storage import Storage
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.hub_kernels import HubKernels, own_lock
from raytrain_adv.transforms.modules import own_forward
from raytrain_adv.transforms.transform import Change, Plan
from raytrain_adv.worker.install import require_alike
from tests.kernel_folders import ACTIVATION, layers, refusal, write_kernel
from tests.ranks import run_ranks

CPU = hardware.detect("cpu")
GPU = replace(CPU, device_type="cuda", cuda_version="13.0")
EXAMPLE = Path(__file__).parents[3] / "jobs" / "kernels" / "llama_layers"
FP8 = {"fp8": True, "fp8_allow_cpu": True, "fp8_min_features": 0}


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
    assert any("tested in LlamaRMSNorm on cpu in float32" in note for note in report.notes)
    assert report.skipped_reasons["no enabled kernel is for SwiGLUMLP"] == 2
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
    model, plan = install(layers(mine, RMSNorm="RMSNorm"), loss_kernel="torch")
    own = {fqn for fqn, m in model.named_modules() if "forward" in vars(m)}
    assert own == set(plan.changes)
    assert not hasattr(LlamaRMSNorm, "kernel_layer_name")
    assert not hasattr(nn.Linear, "kernel_layer_name")


def test_what_transformers_registers_for_kernels_stays_registered(install, mine, monkeypatch):
    """As transformers 5.17 with kernels 0.16 has it; eval and train leave the swap alone."""
    monkeypatch.setattr(LlamaRMSNorm, "kernel_layer_name", "RMSNorm", raising=False)
    monkeypatch.setattr(LlamaRMSNorm, "kernel_condition", None, raising=False)
    model, plan = install(layers(mine, RMSNorm="RMSNorm"))
    assert (LlamaRMSNorm.kernel_layer_name, LlamaRMSNorm.kernel_condition) == ("RMSNorm", None)
    model.eval()
    model.train()
    assert all(own_forward(model.get_submodule(fqn)) for fqn in plan.changes)


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
        ("WrongValue", ("does not compute what LlamaRMSNorm does", "the values off by")),
        ("WrongWhenLong", ("does not compute what LlamaRMSNorm does", "in float32, 1008 rows")),
        ("OtherDtype", ("does not compute what LlamaRMSNorm does", "it returns float64")),
        ("WritesOver", ("WritesOver overwrites its arguments", "its input or its param")),
        ("Crashes", ("fails as a replacement of LlamaRMSNorm", "no such tile")),
        ("Stateful", ("cannot be used here", "constructor")),
        ("TwoArguments", ("fails as a replacement of LlamaRMSNorm", "missing 1 required")),
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


@pytest.mark.parametrize("kind", ["LlamaDecoderLayer", "LlamaRotaryEmbedding", "LlamaModel"])
def test_what_cannot_be_tested_is_not_used(install, mine, kind):
    message = refusal(install, layers(mine, **{kind: "RMSNorm"}))
    assert f"cannot be tested in {kind}" in message


def test_a_kernel_that_passes_linears_by_is_refused(install, mine):
    message = refusal(install, layers(mine, LlamaMLP="Bypass"))
    assert "does not call down_proj, gate_proj, up_proj of LlamaMLP" in message
    assert "turns off what other features put on" in message


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


def test_a_kernel_that_cannot_be_loaded_reports_why(install, tmp_path):
    folder = write_kernel(tmp_path / "k", "import there_is_no_such_package\n" + ACTIVATION)
    message = refusal(install, str(folder))
    assert "cannot be loaded" in message and "there_is_no_such_package" in message


def test_a_kernel_that_ends_the_process_on_import_is_an_error(install, tmp_path):
    text = "import sys\n\nsys.exit(0)\n" + ACTIVATION
    message = refusal(install, str(write_kernel(tmp_path / "k", text)))
    assert "cannot be loaded" in message and "SystemExit: 0" in message


def test_norms_of_other_sizes_are_tested_by_themselves(install, mine):
    """Llama's norms are all of one size; Qwen 3 has others inside its attention."""
    _, plan = install(layers(mine, RMSNorm="RMSNorm"), kind="qwen3")
    assert sorted(t["num_modules"] for t in plan.details["trials"]) == [4, 5]


def test_files_that_changed_after_they_were_fetched_are_refused(make, mine):
    job, model = make(layers(mine, RMSNorm="RMSNorm"))
    Transforms(job).fetch(CPU, print)
    plans = Transforms(job).prepare(model, CPU)
    (copied,) = own_lock(job).parent.glob("kernels/mine-*/torch-cpu/layers.py")
    copied.write_text(copied.read_text() + "\nEVIL = 1\n")
    message = refusal(Transforms(job).install, model, plans, torch.device("cpu"), torch.float32)
    assert "are not those in" in message and "layers.py: sha256" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("variant", "../../../elsewhere"),
        ("folder", "../../elsewhere"),
        ("folder", "/elsewhere"),
        ("commit", "main"),
        ("files", {"../layers.py": 64 * "0"}),
        ("files", {"layers.py": "0"}),
    ],
)
def test_a_lock_file_that_leads_out_of_its_folder_is_refused(make, mine, key, value):
    """The files of a kernel are written to where it says."""
    job, model = make(layers(mine, RMSNorm="RMSNorm"))
    Transforms(job).fetch(CPU, print)
    file = own_lock(job)
    lock = json.loads(file.read_text())
    lock["kernels"][0][key] = value
    file.write_text(json.dumps(lock))
    message = refusal(Transforms(job).plan, model, CPU)
    assert "is not a lock file of this version" in message and f"kernels.0.{key}" in message


def test_workers_load_from_output_dir_when_the_folder_is_gone(make, mine):
    job, model = make(layers(mine, RMSNorm="RMSNorm"))
    Transforms(job).fetch(CPU, print)
    mine.rename(mine.with_name("moved"))
    plans = Transforms(job).prepare(model, CPU)
    plan = Transforms(job).install(model, plans, torch.device("cpu"), torch.float32)["kernels"]
    assert len(plan.changes) == 5


def test_the_worked_example_computes_and_learns_as_the_model_does(install, make):
    model, plan = install(str(EXAMPLE))
    assert len(plan.changes) == 7
    loss, gradients = outcome(model)
    expected_loss, expected = outcome(make()[1])
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_the_examples_build_for_gpus_is_planned_where_triton_does_not_run(make):
    assert read_layers(EXAMPLE / "torch-cuda") == read_layers(EXAMPLE / "torch-cpu")
    job, model = make(str(EXAMPLE), torch_compile=True)
    plan = Transforms(job).plan(model, GPU)["kernels"]
    assert len(plan.changes) == 7
    assert plan.details["kernels"][0]["variant"] == "torch-cuda"


def compare(folder, *names):
    """Compare ranks that have the named kernels; return what each found wrong."""
    run = Run(torch.device("cpu"), Storage.at(folder), "local", SilentReporter())
    found = []
    for name in names:
        change = Change("Norm", f"{name}@{run.rank}" if name == "own" else name)
        try:
            require_alike(run, {"kernels": Plan("kernels", {"norm": change})})
            found.append("")
        except TrainingError as error:
            found.append(error.what)
    return found


def test_ranks_that_would_compute_by_other_kernels_stop_together(tmp_path):
    for same, own in run_ranks(compare, 2, tmp_path, str(tmp_path), "same", "own"):
        assert same == ""
        assert "Workers would compute differently" in own


class Forgets(HubKernels):
    """Puts nothing in place."""

    def install(self, model, plan, worker):
        """Do nothing."""
        return plan


class DoesMore(HubKernels):
    """Replaces one forward pass that was not planned."""

    def install(self, model, plan, worker):
        """Do too much."""
        model.model.embed_tokens.forward = model.model.embed_tokens.forward
        return super().install(model, plan, worker)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Forgets, "has the forward pass it had, planned mine@"),
        (DoesMore, "embed_tokens has another forward pass, which was not planned"),
    ],
)
def test_forward_passes_that_differ_from_the_plan_stop_the_run(make, mine, kind, says):
    job, model = make(layers(mine, RMSNorm="RMSNorm"))
    Transforms(job).fetch(CPU, print)
    plans = Transforms(job).prepare(model, CPU)
    keys = job.transform(HubKernels)
    others = tuple(
        kind(**keys.model_dump(exclude_unset=True)) if t is keys else t for t in job.transforms
    )
    with pytest.raises(TrainingError, match=says):
        Transforms(replace(job, transforms=others)).install(
            model, plans, torch.device("cpu"), torch.float32
        )
