"""Liger's layers are bound to this model alone, and verified one by one; tests/gpu runs them."""

import sys
import types
from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from raytrain_adv.config import load
from raytrain_adv.errors import ClusterError, JobError
from raytrain_adv.hardware import HardwareFacts
from raytrain_adv.ops import liger_layers
from raytrain_adv.transforms import Change, Plan
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.liger import Liger, _globals_kept, require_operators
from raytrain_adv.transforms.transform import Worker
from tests.kernel_folders import ACTIVATION, write_kernel
from tests.tiny_models import KINDS, SIZES, job_for

pytest.importorskip("liger_kernel", reason="liger-kernel is an extra, for Linux alone")
NODE = HardwareFacts("cpu", "CPU", None, 2**34, 0, None, "10.0.0.1", 2**34, 2, {})


def model_of(kind, tmp_path, **keys):
    config = AutoConfig.for_model(kind, **{**SIZES, **KINDS.get(kind, {})})
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return job_for(tmp_path, tmp_path / "job", train_from_scratch=True, **keys), model


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", {"LigerRMSNorm": 5, "LigerSwiGLUMLP": 2}),
        ("qwen3", {"LigerRMSNorm": 9, "LigerSwiGLUMLP": 2}),
        ("gemma2", {"LigerRMSNorm": 9, "LigerGEGLUMLP": 2}),
    ],
)
def test_true_takes_the_norms_and_mlps_that_liger_has_for_the_model(kind, expected, tmp_path):
    job, model = model_of(kind, tmp_path, use_liger_kernel=True)
    plan = Transforms(job).prepare(model)["liger"]
    ends = (change.after.partition(" with Liger's ")[2] for change in plan.changes.values())
    assert Counter(ends) == expected
    for fqn in plan.changes:
        assert model.get_submodule(fqn).forward.__func__.__module__.startswith("liger_kernel.")


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "phi3"])
def test_compiled_all_that_true_takes_is_known_not_to_write_over_weights(kind, tmp_path):
    """torch.compile does not see what Liger's kernels write to."""
    job, model = model_of(kind, tmp_path, use_liger_kernel=True, torch_compile=True)
    plan = Transforms(job).prepare(model)["liger"]
    require_operators(model, plan)
    norm = model.model.norm.forward.__func__
    assert norm.__globals__["LigerRMSNormFunction"] is liger_layers.RMSNormFunction


def test_compiled_a_layer_that_is_not_known_is_refused(tmp_path):
    """Mixtral's experts; its norms alone are fine."""
    job, model = model_of("mixtral", tmp_path, use_liger_kernel=True, torch_compile=True)
    plan = Transforms(job).prepare(model)["liger"]
    with pytest.raises(JobError, match=r"may compile Liger.s Liger\w+ wrongly"):
        require_operators(model, plan)
    norms = {"use_liger_kernel": {"rms_norm": True}, "torch_compile": True}
    job, model = model_of("mixtral", tmp_path / "norms", **norms)
    plan = Transforms(job).prepare(model)["liger"]
    require_operators(model, plan)


def test_other_models_of_the_process_stay_as_they_are(tmp_path):
    from transformers.models.llama import modeling_llama

    names = ("LlamaRMSNorm", "LlamaMLP", "apply_rotary_pos_emb")
    before = [getattr(modeling_llama, name) for name in names]
    forward = modeling_llama.LlamaForCausalLM.forward
    every = {"rms_norm": True, "swiglu": True, "rope": True}
    job, model = model_of("llama", tmp_path, use_liger_kernel=every, loss_kernel="torch")
    Transforms(job).prepare(model)
    assert [getattr(modeling_llama, name) for name in names] == before
    assert modeling_llama.LlamaForCausalLM.forward is forward and "forward" not in vars(model)
    _, other = model_of("llama", tmp_path)
    assert not any("forward" in vars(m) for m in other.modules())


def test_true_leaves_to_kernels_what_they_compute_and_a_mapping_does_not(tmp_path):
    """So the documented combination of both holds as it is written."""
    keys = {"use_kernels": True, "kernel_name": str(write_kernel(tmp_path / "a", ACTIVATION))}
    job, model = model_of("llama", tmp_path, use_liger_kernel=True, **keys)
    Transforms(job).fetch(NODE, print)
    plan = Transforms(job).prepare(model, NODE)["liger"]
    assert len(plan.changes) == 5 and all("norm" in fqn for fqn in plan.changes)
    assert set(plan.skipped.values()) == {"computed by kernels"} and len(plan.skipped) == 2
    assert "forward" not in vars(model.model.layers[0].mlp)
    named = {"rms_norm": True, "swiglu": True}
    job, model = model_of("llama", tmp_path / "b", use_liger_kernel=named, **keys)
    Transforms(job).fetch(NODE, print)
    with pytest.raises(JobError, match="would both change the same modules"):
        Transforms(job).prepare(model, NODE)


def test_the_plan_changes_nothing_and_a_mapping_takes_what_it_names(tmp_path):
    layers = {"rms_norm": False, "swiglu": True, "rope": False}
    job, model = model_of("llama", tmp_path, use_liger_kernel=layers)
    changes = Transforms(job).plan(model)["liger"].changes
    assert list(changes) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert not any("forward" in vars(m) for m in model.modules())


def test_rope_is_each_attentions_own_and_computes_by_ligers_function(tmp_path, monkeypatch):
    from liger_kernel.transformers import rope
    from transformers.models.llama import modeling_llama

    calls = []

    def counted(q, k, cos, sin, *rest):
        calls.append(q.shape)
        return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)

    counted.__module__ = "liger_kernel.transformers.rope"
    monkeypatch.setattr(rope, "liger_rotary_pos_emb", counted)
    job, _ = model_of("llama", tmp_path, use_liger_kernel={"rope": True})
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    ids = torch.arange(20)[None]
    expected = model(input_ids=ids).logits
    assert set(Transforms(job).prepare(model)["liger"].changes) == {
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
    }
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=0)
    assert len(calls) == 2
    layer = torch.compile(model.model, backend="eager")
    layer(input_ids=ids)
    assert len(calls) >= 4


def test_a_model_that_liger_does_not_know_is_an_error(tmp_path):
    job, model = model_of("cohere", tmp_path, use_liger_kernel=True)
    with pytest.raises(JobError, match="no kernels for this model: cohere"):
        Transforms(job).plan(model)


def test_a_requested_layer_that_the_model_lacks_is_an_error(tmp_path):
    job, model = model_of("gemma2", tmp_path, use_liger_kernel={"rms_norm": True, "swiglu": True})
    with pytest.raises(JobError, match="swiglu: true changes nothing in this model"):
        Transforms(job).plan(model)


def test_names_that_liger_lacks_and_its_losses_are_refused_by_name(job_file):
    with pytest.raises(JobError, match="did you mean rms_norm") as error:
        load(job_file(use_liger_kernel={"rmsnorm": True, "fused_linear_cross_entropy": True}))
    assert "loss_kernel: liger" in str(error.value)
    with pytest.raises(JobError, match="turns nothing on"):
        load(job_file(use_liger_kernel={"rope": False}))


def test_llamafactorys_key_is_the_same(job_file):
    job = load(job_file(enable_liger_kernel=True))
    assert job.transform(Liger).enabled


def test_a_run_on_cpus_is_refused_when_the_file_is_read(job_file):
    with pytest.raises(JobError, match="use_liger_kernel and use_cpu"):
        load(job_file(use_liger_kernel=True, use_cpu=True))


def test_a_node_without_a_gpu_or_without_the_package_is_refused():
    liger = Liger(use_liger_kernel=True)
    with pytest.raises(ClusterError, match="needs liger-kernel"):
        liger.check(NODE)
    there = {**asdict(NODE), "versions": {"liger-kernel": "0.8.5"}}
    with pytest.raises(ClusterError, match="run on GPUs only"):
        liger.check(HardwareFacts(**there))
    liger.check(HardwareFacts(**{**there, "device_type": "cuda"}))


@pytest.mark.parametrize("version", ["0.8.0", "0.8.4", "0.8.5.dev1"])
def test_a_liger_whose_gradients_are_wrong_is_refused(version):
    there = {**asdict(NODE), "versions": {"liger-kernel": version}, "device_type": "cuda"}
    with pytest.raises(ClusterError, match=r"needs liger-kernel>=0\.8\.5") as refused:
        Liger(use_liger_kernel=True).check(HardwareFacts(**there))
    assert version in refused.value.found


@pytest.mark.parametrize("given", [{}, {"rms_norm": False}, {"rmsnorm": True}])
def test_a_mapping_that_turns_nothing_on_is_one_problem(job_file, given):
    with pytest.raises(JobError, match=r"\(1 problem\)"):
        load(job_file(use_liger_kernel=given))


def test_compiling_as_well_is_advised_against(tmp_path):
    job, model = model_of("llama", tmp_path, use_liger_kernel=True, torch_compile=True)
    (sentence,) = Transforms(job).plan(model)["liger"].notes
    assert "can be slower than with torch_compile alone" in sentence
    job, model = model_of("llama", tmp_path, use_liger_kernel=True)
    assert Transforms(job).plan(model)["liger"].notes == ()


class Mlp(nn.Module):
    """A module whose forward is replaced."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(16, 24), nn.Linear(16, 24)
        self.down_proj = nn.Linear(24, 16)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def right(self, x):
    up = self.up_proj(x)
    return self.down_proj(up * nn.functional.silu(self.gate_proj(x)))


def wrong(self, x):
    return self.down_proj(nn.functional.gelu(self.gate_proj(x)) * self.up_proj(x))


def reads_weights(self, x):
    up = nn.functional.linear(x, self.up_proj.weight, self.up_proj.bias)
    return self.down_proj(nn.functional.silu(self.gate_proj(x)) * up)


def cuts(self, x):
    gate = nn.functional.silu(self.gate_proj(x)).detach()
    return self.down_proj(gate * self.up_proj(x))


def probed(forward):
    model = nn.Sequential(Mlp())
    model[0].forward = types.MethodType(forward, model[0])
    plan = Plan("liger", {"0": Change("Mlp", f"Mlp with {forward.__name__}")})
    job = SimpleNamespace(parallel=SimpleNamespace(torch_compile=False))
    liger = Liger(use_liger_kernel=True)
    return liger.install(model, plan, Worker(job, torch.device("cpu"), torch.float32)).notes


def test_the_probe_passes_what_computes_the_same():
    (sentence,) = probed(right)
    assert sentence.startswith("right tested in Mlp on cpu in float32: values off by ")
    assert sentence.endswith("in 1 modules")


@pytest.mark.parametrize(
    ("forward", "found"),
    [
        (wrong, "wrong does not compute what Mlp does"),
        (reads_weights, "reads_weights does not call up_proj of Mlp"),
        (cuts, "cut the gradient of gate_proj.weight, gate_proj.bias"),
    ],
)
def test_the_probe_stops_what_does_not(forward, found):
    with pytest.raises(JobError) as error:
        probed(forward)
    assert found in str(error.value)


def test_rope_is_found_by_every_layer_that_torch_compile_breaks_in_two(tmp_path, monkeypatch):
    """What was compiled for the first layer's attention runs in the others', and in those of a
    model without Liger nothing of it does.
    """
    from liger_kernel.transformers import rope
    from transformers.models.llama import modeling_llama

    theirs, calls = modeling_llama.apply_rotary_pos_emb, []

    def breaking(q, k, cos, sin, *rest):
        torch._dynamo.graph_break()
        calls.append(q.shape)
        return theirs(q, k, cos, sin)

    breaking.__module__ = "liger_kernel.transformers.rope"
    monkeypatch.setattr(rope, "liger_rotary_pos_emb", breaking)
    job, _ = model_of("llama", tmp_path, use_liger_kernel={"rope": True})
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    plain, ids = AutoModelForCausalLM.from_config(model.config).eval(), torch.arange(20)[None]
    Transforms(job).prepare(model)
    for one in (model, plain):
        expected = one(input_ids=ids).logits
        calls.clear()
        for layer in one.model.layers:
            layer.compile(backend="eager")
        torch.testing.assert_close(one(input_ids=ids).logits, expected)
        assert bool(calls) == (one is model)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "glm4"])
def test_rope_is_tested_in_an_attention_of_its_own(kind, tmp_path, monkeypatch):
    """Queries and keys are turned by known angles; a rotation the other way is found out. glm4
    turns half of the features.
    """
    monkeypatch.setitem(KINDS, "glm4", {"pad_token_id": 0, "head_dim": 8})
    from liger_kernel.transformers import rope
    from transformers.models.llama import modeling_llama

    theirs = __import__(
        f"transformers.models.{kind}.modeling_{kind}", fromlist=["apply_rotary_pos_emb"]
    ).apply_rotary_pos_emb

    def turned(by):
        def rotated(q, k, cos, sin, *rest):
            return theirs(q, k, cos, by * sin)

        rotated.__module__ = modeling_llama.__name__.replace("transformers", "liger_kernel", 1)
        return rotated

    for by, wrong in ((1.0, None), (-1.0, "does not compute what")):
        monkeypatch.setattr(rope, "liger_rotary_pos_emb", turned(by))
        job, model = model_of(kind, tmp_path, use_liger_kernel={"rope": True})
        plans = Transforms(job).prepare(model)
        arguments = model, plans, torch.device("cpu"), torch.float32
        if wrong is None:
            (sentence,) = Transforms(job).install(*arguments)["liger"].notes
            assert "tested in" in sentence and sentence.endswith("in 2 modules")
        else:
            with pytest.raises(JobError, match=wrong):
                Transforms(job).install(*arguments)


def test_what_an_error_interrupts_is_put_back_too(tmp_path):
    """A sweep's driver lives on: the next trial would have had Liger's functions."""
    _, model = model_of("llama", tmp_path)
    home = sys.modules[type(model).__module__]
    before = dict(vars(home))
    with pytest.raises(ZeroDivisionError), _globals_kept(model):
        home.apply_rotary_pos_emb, home.added = None, True
        raise ZeroDivisionError
    assert vars(home) == before
