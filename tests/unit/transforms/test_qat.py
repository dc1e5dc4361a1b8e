"""QAT's rules, plan and schedule; no GPU needed."""

from dataclasses import replace

import pytest
import torch

from raytrain_adv import hardware
from raytrain_adv.errors import ClusterError, JobError
from raytrain_adv.export.layout import why_not_exact
from raytrain_adv.model.build import build
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.fp8 import Fp8
from raytrain_adv.transforms.qat import EMBEDDING, LINEAR, LINEAR_IN_FLOAT8, Qat, rounding
from tests.tiny_models import job_for, write_checkpoint

CPU = hardware.detect("cpu")
H100 = replace(CPU, device_type="cuda", device_name="NVIDIA H100", compute_capability=(9, 0))
KEYS = {"enable_qat": True, "finetuning_type": "full"}
FLOAT8 = {"qat_weight_dtype": "float8_e4m3fn", "qat_activation_dtype": "float8_e4m3fn"}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 96}


def planned(tmp_path, kind="llama", shapes=WIDE, **keys):
    folder = write_checkpoint(kind, tmp_path / "model", **shapes)
    job = job_for(folder, tmp_path, **{**KEYS, **keys})
    return job, build(job), lambda: Transforms(job).plan(build(job), CPU)["qat"]


def refusal(tmp_path, **keys):
    with pytest.raises(JobError) as found:
        job_for(tmp_path, tmp_path, **{**KEYS, **keys})
    return str(found.value)


def test_linears_and_the_embedding_are_planned_and_the_head_stays(tmp_path):
    _, _, plan = planned(tmp_path, qat_quantize_embedding=True)
    found = plan()
    assert found.skipped == {"lm_head": "the language-model head"}
    assert found.changes["model.embed_tokens"].after == EMBEDDING
    linears = [fqn for fqn, change in found.changes.items() if change.after == LINEAR]
    assert len(linears) == 14  # seven, in two layers


def test_what_is_planned_owns_the_same_parameters(tmp_path):
    job, model, _ = planned(tmp_path)
    before = dict(model.named_parameters())
    Transforms(job).prepare(model, CPU)
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in before.items()}


@pytest.mark.parametrize(
    "step, delay, on",
    [(0, None, True), (0, 0, True), (4, 5, False), (5, 5, True), (99, "never", False)],
)
def test_rounding_begins_exactly_with_step_n(tmp_path, step, delay, on):
    job, model, _ = planned(tmp_path, fake_quant_after_n_steps=delay)
    Transforms(job).prepare(model, CPU)
    qat = job.transform(Qat)
    Transforms(job).begin_step(model, step)
    assert {module.rounds for module in rounding(model)} == {on}
    assert qat.is_on(step) is on


@pytest.mark.parametrize("kind", ["embedding", "linear"])
def test_each_layer_computes_unrounded_before_step_n_and_rounded_from_it_on(tmp_path, kind):
    """By what it returns: the loss alone would not tell of an embedding that never switches."""
    job, model, _ = planned(tmp_path, fake_quant_after_n_steps=3, qat_quantize_embedding=True)
    Transforms(job).prepare(model, CPU)
    model.to_empty(device="cpu").to(torch.float32)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    if kind == "embedding":
        layer, x = model.model.embed_tokens, torch.arange(32)
        plain = torch.nn.functional.embedding(x, layer.weight)
    else:
        layer, x = model.model.layers[0].mlp.up_proj, torch.randn(8, 64)
        plain = torch.nn.functional.linear(x, layer.weight)
    found = []
    for step in (0, 2, 3, 4):
        Transforms(job).begin_step(model, step)
        found.append(layer(x))
    assert torch.equal(found[0], plain) and torch.equal(found[1], plain)
    assert not torch.equal(found[2], plain) and torch.equal(found[2], found[3])
    assert torch.allclose(found[2], plain, rtol=0.1, atol=0.5)


def test_a_delay_beyond_the_last_step_is_refused():
    with pytest.raises(JobError) as found:
        Qat(enable_qat=True, fake_quant_after_n_steps=30).check_length(30)
    assert "at most 29" in found.value.fix and "30" in found.value.found
    Qat(enable_qat=True, fake_quant_after_n_steps=29).check_length(30)
    Qat(enable_qat=True, fake_quant_after_n_steps="never").check_length(30)


def test_a_group_size_that_does_not_divide_names_the_layer_and_what_fits(tmp_path):
    shapes = {**WIDE, "intermediate_size": 48}
    _, _, plan = planned(tmp_path, shapes=shapes, qat_group_size=32)
    with pytest.raises(JobError) as found:
        plan()
    assert "mlp.down_proj has 48 features" in found.value.found
    assert "16 or null" in found.value.fix


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"qat_weight_dtype": "nvfp4"}, "qat_target: vllm-nvfp4a16"),
        ({"qat_weight_dtype": "mxfp8"}, "Blackwell"),
        ({"qat_weight_dtype": "int5"}, "served are"),
        ({"qat_weight_dtype": "int4", "qat_activation_dtype": "float8_e4m3fn"}, "no kernel"),
        ({"qat_weight_dtype": "float8_e4m3fn", "qat_activation_dtype": "int8"}, "no kernel"),
        ({"qat_weight_dtype": "float8_e4m3fn", "qat_group_size": 32}, "one scale per channel"),
        ({"qat_weight_dtype": "float8_e4m3fn", "qat_quantize_embedding": True}, "float8 tables"),
        ({"fp8": True, "fp8_recipe": "rowwise"}, "fp8_recipe: tensorwise"),
        ({"fp8": True, "fp8_enable_fsdp_float8_all_gather": True}, "gathered in float8"),
        (
            {"qat_weight_dtype": "float8_e4m3fn", "qat_activation_dtype": "float8_e4m3fn"},
            "come out in bfloat16",
        ),
        ({"fake_quant_after_n_steps": "later"}, "never"),
        ({"fake_quant_after_n_steps": 9, "max_steps": 9}, "at most 8"),
        ({"compare": True}, "hold rows out"),
        ({**FLOAT8, "bf16": False}, "set bf16: true"),
        ({"qat_target": "vllm-nvfp4a16", "bf16": False}, "read as bfloat16"),
        ({"qat_target": "vllm-mxfp4a16", "bf16": False}, "read as bfloat16"),
        ({**FLOAT8, "bf16": True, "use_cpu": True}, "compute capability 8.9"),
    ],
)
def test_what_cannot_be_served_is_refused_with_what_can(tmp_path, keys, said):
    assert said in refusal(tmp_path, **keys)


def test_a_run_that_never_switches_is_its_own_twin(tmp_path):
    keys = {**KEYS, "compare": True, "val_size": 8, "fake_quant_after_n_steps": "never"}
    job = job_for(tmp_path, tmp_path, **keys)
    assert list(Transforms(job).twins()) == []
    assert any("the run is its own twin" in note for note in job.notes)


def test_the_documented_example_is_served(tmp_path):
    keys = {"qat_weight_dtype": "int8", "qat_activation_dtype": "int8", "qat_group_size": 32}
    delayed = {"qat_quantize_embedding": True, "fake_quant_after_n_steps": 100}
    _, _, plan = planned(tmp_path, **keys, **delayed)
    assert "from step 101 on" in plan().notes[0]
    assert len(plan().changes) == 15


def test_an_exclude_that_matches_nothing_is_an_error(tmp_path):
    _, _, plan = planned(tmp_path, qat_exclude="down_prj")
    with pytest.raises(JobError, match="matches no linear"):
        plan()
    _, _, plan = planned(tmp_path / "b", qat_exclude="down_proj, *.0.*.q_proj")
    assert list(plan().skipped.values()).count("in qat_exclude") == 3


def test_the_bf16_twin_is_without_fp8_too(tmp_path):
    keys = {"fp8": True, "bf16": True, "fp8_min_features": 0, "compare": True, "val_size": 8}
    job, _, _ = planned(tmp_path, **keys, qat_weight_dtype="int4")
    (twin,) = Transforms(job).twins()
    assert not twin.transform(Fp8).enabled and not twin.transform(Qat).enabled
    assert job.transform(Fp8).enabled


@pytest.mark.parametrize(
    "keys",
    [
        {"neftune_noise_alpha": 5},
        {"use_kernels": True, "kernel_name": "jobs/kernels/llama_layers"},
        {"bf16": True, "use_liger_kernel": True},
    ],
)
def test_converted_models_are_compared_bit_for_bit_with_trained_ones_next_to(tmp_path, keys):
    """Noise is for training alone, and kernels are off for the comparison."""
    job, _, _ = planned(tmp_path, **keys)
    assert why_not_exact(job, torch.device("cpu"), torch.device("cpu")) == ""


def test_a_run_that_exports_nothing_reports_what_is_not_compared(tmp_path):
    _, _, plan = planned(tmp_path, export_model=False)
    what = "is written or compared with the trained one"
    assert any(what in note for note in plan().notes)
    _, _, exporting = planned(tmp_path / "b")
    assert not any("export_model is false" in note for note in exporting().notes)


def test_a_model_of_which_no_linear_would_be_rounded_is_refused(tmp_path):
    """GPT-2's are of a class of their own; its embedding alone is not what was asked for."""
    for folder, lora in ((tmp_path, {}), (tmp_path / "lora", {"finetuning_type": "lora"})):
        _, _, plan = planned(folder, kind="gpt2", shapes={}, **lora)
        with pytest.raises(JobError, match="would not round any linear") as refusal:
            plan()
        assert "8 linears are transformers' Conv1D" in refusal.value.found
        assert "adapter" not in refusal.value.found
        assert refusal.value.fix.startswith("take a model of torch.nn.Linear")
    _, _, plan = planned(tmp_path / "b", qat_exclude="*proj")
    with pytest.raises(JobError, match="in qat_exclude"):
        plan()


def test_on_an_fp8_linear_the_plan_reports_what_is_computed_in_fp8(tmp_path):
    fp8 = {"fp8": True, "bf16": True, "fp8_min_features": 16, "fp8_exclude": "down_proj"}
    job, model, plan = planned(tmp_path, **fp8, qat_weight_dtype="int4")
    plans = Transforms(job).prepare(model, CPU)
    kinds = [change.after for change in plans["qat"].changes.values()]
    assert (kinds.count(LINEAR_IN_FLOAT8), kinds.count(LINEAR)) == (12, 2)
    assert any("careful tuning: all three products" in note for note in plans["qat"].notes)
    _, _, plan = planned(tmp_path / "b", **fp8, qat_weight_dtype="int8")
    assert any("forward passes are not" in note for note in plan().notes)


def test_fp8_next_to_int8_on_frozen_weights_would_do_little_and_is_refused(tmp_path):
    keys = {"fp8": True, "bf16": True, "fp8_min_features": 16, "finetuning_type": "lora"}
    _, _, plan = planned(tmp_path, **keys)
    with pytest.raises(JobError, match="little to do"):
        plan()
    _, _, plan = planned(tmp_path / "b", **keys, qat_weight_dtype="int4")
    assert any(change.after == LINEAR_IN_FLOAT8 for change in plan().changes.values())


def test_adapters_stay_and_their_base_is_rounded(tmp_path):
    _, _, plan = planned(tmp_path, finetuning_type="lora")
    found = plan()
    assert "model.layers.0.self_attn.q_proj.base_layer" in found.changes
    assert not any("lora_" in fqn for fqn in found.changes)


def test_dora_reads_weights_past_the_linear_and_is_refused(tmp_path):
    text = refusal(tmp_path, finetuning_type="lora", use_dora=True)
    assert "use_dora and enable_qat: DoRA computes with the base weights themselves" in text
    assert "set use_dora: false, or enable_qat: false" in text


def test_a_tied_embedding_is_rounded_and_the_head_is_not(tmp_path):
    tied = {**WIDE, "tie_word_embeddings": True}
    job, model, plan = planned(tmp_path, shapes=tied, qat_quantize_embedding=True)
    assert any("the head tied to the embedding" in note for note in plan().notes)
    Transforms(job).prepare(model, CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert type(model.lm_head) is torch.nn.Linear


def test_a_machine_that_cannot_run_the_quantized_model_is_refused():
    qat = Qat(enable_qat=True, **FLOAT8)
    with pytest.raises(ClusterError, match=r"8\.9"):
        qat.check(CPU)
    qat.check(H100)
    with pytest.raises(ClusterError, match="torchao not available"):
        qat.check(replace(CPU, versions={"torchao": None}))
    with pytest.raises(ClusterError, match="llamacpp-q8_0 needs gguf") as error:
        of_gguf = Qat(enable_qat=True, qat_target="llamacpp-q8_0")
        of_gguf.check(replace(CPU, versions={"torchao": "0.18.0", "gguf": None}))
    assert "pip install 'gguf>=0.17'" in error.value.fix
