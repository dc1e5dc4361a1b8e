"""Standard quantization's rules and plan, what is loaded, and what it takes; no GPU needed."""

from dataclasses import replace

import pytest
import torch

from raytrain_adv import hardware
from raytrain_adv.errors import ClusterError, JobError, TrainingError
from raytrain_adv.estimate import memory
from raytrain_adv.estimate.flops import training_flops_per_token
from raytrain_adv.model.build import build
from raytrain_adv.model.weights import load_pretrained, materialize
from raytrain_adv.ops.bitsandbytes.linear import PackedLinear, num_weights, packed_linears
from raytrain_adv.ops.float8.stored_linear import StoredFloat8Linear
from raytrain_adv.text import GIB
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.quantized_base import QuantizedBase
from tests.tiny_models import job_for, write_checkpoint

CPU = hardware.detect("cpu")
DEVICE = torch.device("cpu")
KEYS = {"finetuning_type": "lora", "lora_rank": 4, "quantization_bit": 4, "bf16": True}
FLOAT8 = {"quantization_bit": 8, "quantization_type": "fp8"}
ON_CPU = {**FLOAT8, "quantization_allow_cpu": True}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 96}


def job_of(tmp_path, kind="llama", shapes=WIDE, **keys):
    folder = write_checkpoint(kind, tmp_path / "model", **shapes)
    return job_for(folder, tmp_path, **{**KEYS, **keys})


def planned(tmp_path, *args, **keys):
    job = job_of(tmp_path, *args, **keys)
    return Transforms(job).plan(build(job), CPU)["qlora"]


def loaded(job):
    model = build(job)
    plans = Transforms(job).prepare(model, CPU)
    materialize(model, DEVICE)
    load_pretrained(model, job, DEVICE)
    return model, plans


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (
            {"fp8": True, "fp8_allow_cpu": True},
            "fp8 and quantization_bit: FP8 and standard quantization are mutually exclusive",
        ),
        (
            {"enable_qat": True},
            "quantization_bit and enable_qat: QAT and standard quantization are mutually exclusive",
        ),
        (
            {"finetuning_type": "full", "lora_rank": 8},
            "finetuning_type and quantization_bit: quantized weights have no gradient",
        ),
        (
            {"quantization_bit": 8, "quantization_type": "fp4"},
            "quantization_type and quantization_bit: 8 bits are always integers",
        ),
        ({"quantization_type": "fp8"}, "quantization_type and quantization_bit: fp8 has 8 bits"),
        (
            {**FLOAT8, "use_cpu": True},
            "quantization_type and use_cpu: FP8 requires Hopper architecture",
        ),
        (
            {"quantization_products": "dequantized"},
            "quantization_products and quantization_type: only weights in fp8",
        ),
        ({"quantization_method": "fp8"}, "float8 is quantization_bit: 8 with quantization_type"),
        ({"quantization_bit": 3}, "bitsandbytes has 4 and 8 bits"),
        ({"quantization_method": "gptq"}, "gptq is not in this version"),
        (
            {"quantization_bit": None, "quantization_type": "fp4"},
            "its feature is off by its own keys",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_both_keys(tmp_path, keys, what):
    with pytest.raises(JobError) as refusal:
        job_for(tmp_path, tmp_path, **{**KEYS, **keys})
    assert what in str(refusal.value)


def test_fp8_and_qat_and_full_training_are_refused_at_once(tmp_path):
    keys = {"fp8": True, "enable_qat": True, "finetuning_type": "full", "lora_rank": 8}
    with pytest.raises(JobError) as refusal:
        job_for(tmp_path, tmp_path, **{**KEYS, **keys})
    message = str(refusal.value)
    assert message.count("standard quantization are mutually exclusive") == 2
    assert "set finetuning_type: lora, or delete quantization_bit" in message


def test_a_node_without_bitsandbytes_is_named():
    facts = replace(CPU, versions={**CPU.versions, "bitsandbytes": None}, node_ip="10.0.3.7")
    with pytest.raises(ClusterError, match="bitsandbytes not available") as refusal:
        QuantizedBase(quantization_bit=4).check(facts)
    assert "10.0.3.7" in refusal.value.found and "pip install" in refusal.value.fix


def test_float8_needs_hopper_or_products_by_values_and_no_bitsandbytes():
    a100 = replace(
        CPU,
        device_type="cuda",
        compute_capability=(8, 0),
        versions={**CPU.versions, "bitsandbytes": None},
        node_ip="10.0.3.7",
    )
    with pytest.raises(ClusterError, match="requires Hopper architecture") as refusal:
        QuantizedBase(**FLOAT8).check(a100)
    assert "set quantization_products: dequantized" in refusal.value.fix
    QuantizedBase(**FLOAT8, quantization_products="dequantized").check(a100)
    QuantizedBase(**FLOAT8).check(replace(a100, compute_capability=(9, 0)))
    with pytest.raises(ClusterError, match="requires Hopper") as refusal:
        QuantizedBase(**FLOAT8).check(CPU)
    assert "quantization_allow_cpu: true allows it" in refusal.value.fix
    QuantizedBase(**ON_CPU).check(CPU)


def test_float8_leaves_linears_whose_products_a_gpu_refuses(tmp_path):
    shapes = {**WIDE, "intermediate_size": 120}
    plan = planned(tmp_path, shapes=shapes, **ON_CPU)
    assert (
        plan.skipped["model.layers.1.mlp.down_proj.base_layer"] == "120 x 64: not divisible by 16"
    )
    assert any("products in training are in FP8" in note for note in plan.notes)
    keys = {**FLOAT8, "quantization_products": "dequantized"}
    plan = planned(tmp_path, shapes=shapes, **keys)
    assert len(plan.changes) == 14
    assert any("by the weights' values" in note for note in plan.notes)


def test_dora_is_refused(tmp_path):
    with pytest.raises(JobError, match="DoRA computes with the base weights themselves"):
        planned(tmp_path, use_dora=True)


def test_a_width_whose_bytes_do_not_fill_an_item_stays_and_is_named(tmp_path):
    """Its shape was rounded down, and loading ended in an error of shapes."""
    shapes = {**WIDE, "intermediate_size": 127}
    plan = planned(tmp_path, shapes=shapes, quantization_bit=8, lora_target="q_proj")
    odd = plan.skipped["model.layers.1.mlp.down_proj"]
    assert odd == "127 input features are not a whole number of 2 bytes"


def test_head_embedding_norms_and_odd_sizes_stay_and_are_named(tmp_path):
    plan = planned(tmp_path, shapes={**WIDE, "intermediate_size": 120}, lora_target="q_proj")
    assert plan.skipped["lm_head"] == "the language-model head"
    assert plan.skipped["model.embed_tokens"].startswith("an embedding")
    odd = plan.skipped["model.layers.1.mlp.down_proj"]
    assert odd == "120 input features do not divide into blocks of 64"
    assert plan.changes.keys() >= {
        "model.layers.0.self_attn.q_proj.base_layer",
        "model.layers.0.self_attn.k_proj",  # no adapter on it, and quantized all the same
    }
    assert len(plan.changes) == 12 and not any("lora_" in fqn for fqn in plan.skipped)
    (left,) = (note for note in plan.notes if note.startswith("left in bfloat16"))
    assert left == (
        "left in bfloat16: embeddings 6,144, other weights 15,360, norms 320, the head 6,144"
    )


def test_eight_bits_take_any_size(tmp_path):
    plan = planned(tmp_path, shapes={**WIDE, "intermediate_size": 120}, quantization_bit=8)
    assert len(plan.changes) == 14
    assert "int8 with a scale per row" in plan.notes[0]


def test_excluded_linears_stay_and_an_exclude_that_matches_nothing_is_an_error(tmp_path):
    plan = planned(tmp_path, quantization_exclude="down_proj, model.layers.0.*")
    assert len(plan.changes) == 6
    with pytest.raises(JobError, match="quantization_exclude down_prj matches no linear"):
        planned(tmp_path, quantization_exclude="down_prj")


def test_routers_and_stacked_experts_stay_and_are_named(tmp_path):
    shapes = {**WIDE, "shared_expert_intermediate_size": 64}
    plan = planned(tmp_path, "qwen2_moe", shapes)
    assert any(fqn.endswith("shared_expert.gate_proj.base_layer") for fqn in plan.changes)
    assert not any(fqn.endswith(("mlp.gate", "shared_expert_gate")) for fqn in plan.changes)
    assert any(fqn.endswith("experts.base_layer.base_layer") for fqn in plan.skipped)
    assert plan.skipped["model.layers.0.mlp.gate"] == "it routes tokens to experts"
    (left,) = (note for note in plan.notes if note.startswith("left in bfloat16"))
    assert "routers 640" in left  # two layers' rows of 64, of four experts and the shared one


def test_an_fp8_base_of_experts_alone_is_refused(tmp_path):
    """They multiply by the weights' values: the proof by _scaled_mm would stop the first steps."""
    dequantized = {"quantization_products": "dequantized"}
    keys = {**FLOAT8, "quantization_allow_cpu": True, "quantization_exclude": "*_proj"}
    with pytest.raises(JobError, match="no linear to multiply in FP8"):
        planned(tmp_path, "mixtral", {**WIDE, "num_local_experts": 4}, **keys)
    assert planned(tmp_path, "mixtral", {**WIDE, "num_local_experts": 4}, **keys, **dequantized)


@pytest.mark.parametrize(
    ("kind", "shapes", "keys"),
    [
        ("llama", WIDE, {}),
        ("llama-tied", WIDE, {"quantization_type": "fp4", "double_quantization": False}),
        ("qwen2", WIDE, {"quantization_bit": 8}),  # with biases
        ("phi3", {**WIDE, "pad_token_id": 0}, {"bf16": False}),  # joint projections
        ("qwen2", WIDE, ON_CPU),
    ],
)
def test_weights_are_quantized_as_they_are_read_and_compared_with_the_originals(
    tmp_path, kind, shapes, keys
):
    job = job_of(tmp_path, kind, shapes, **keys)
    model, plans = loaded(job)
    notes = Transforms(job).initialize(model, plans, 0)["qlora"].notes
    assert any("from the originals" in note and "what rounding explains" in note for note in notes)
    plain = job_for(tmp_path / "model", tmp_path / "plain", finetuning_type="full", pure_bf16=True)
    reference = build(plain)
    materialize(reference, DEVICE)
    load_pretrained(reference, plain, DEVICE)
    layers = dict(packed_linears(model))
    assert layers.keys() == plans["qlora"].changes.keys()
    for fqn, layer in layers.items():
        original = reference.get_parameter(f"{fqn.removesuffix('.base_layer')}.weight").float()
        apart = (layer.unpacked().float() - original).norm() / original.norm()
        assert float(apart.detach()) < 0.13
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)


def test_a_weight_that_was_not_read_or_would_be_trained_is_noticed(tmp_path):
    job = job_of(tmp_path)
    model, plans = loaded(job)
    layers = dict(packed_linears(model))
    fqn, layer = next(iter(layers.items()))
    layer.distance[2] = 1.5
    model.get_parameter("lm_head.weight").requires_grad_(True)
    with pytest.raises(TrainingError, match="differs from the checkpoint") as error:
        Transforms(job).initialize(model, plans, 0)
    assert f"{fqn}: a weight is 1.5 times as far off" in error.value.found
    assert "lm_head.weight would be trained" in error.value.found
    layer.distance = None
    with pytest.raises(TrainingError, match=f"{fqn} was not read"):
        Transforms(job).initialize(model, plans, 0)


@pytest.mark.parametrize("bits", [4, 8])
def test_products_are_compared_with_bitsandbytes_before_training(tmp_path, monkeypatch, bits):
    job = job_of(tmp_path, quantization_bit=bits)
    model = build(job)
    plans = Transforms(job).prepare(model, CPU)
    (note,) = Transforms(job).install(model, plans, DEVICE, torch.float32)["qlora"].notes[-1:]
    assert "bit for bit on cpu" in note
    forward = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: forward(self, x) * 1.001)
    with pytest.raises(TrainingError, match="and bitsandbytes' own compute different results"):
        Transforms(job).install(model, plans, DEVICE, torch.float32)


def test_float8_products_are_compared_with_unrounded_ones_before_training(tmp_path, monkeypatch):
    job = job_of(tmp_path, **ON_CPU)
    model = build(job)
    plans = Transforms(job).prepare(model, CPU)
    install = Transforms(job).install
    (note,) = install(model, plans, DEVICE, torch.bfloat16)["qlora"].notes[-1:]
    assert "tested on cpu, 4 sizes: products off by" in note
    forward = StoredFloat8Linear.forward
    monkeypatch.setattr(StoredFloat8Linear, "forward", lambda self, x: forward(self, x) * 1.2)
    with pytest.raises(TrainingError, match="FP8 products give wrong results on this machine"):
        install(model, plans, DEVICE, torch.bfloat16)


def test_memory_knows_weights_in_float8(tmp_path):
    shapes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 96}
    found = {}
    for name, keys in {"fp8": ON_CPU, "bf16": {"quantization_bit": None}}.items():
        job = job_of(tmp_path, shapes=shapes, **keys)
        model = build(job)
        Transforms(job).prepare(model, CPU)
        found[name] = (model, memory.predict(model, job, world_size=2, seq_len=64, batch=1))
    ours, theirs = found["fp8"][1], found["bf16"][1]
    linears = sum(m.in_features * m.out_features for _, m in packed_linears(found["fp8"][0]))
    saved = (theirs.parameters - ours.parameters) * 2 * GIB
    assert saved == pytest.approx(linears, rel=0.02)  # a byte of two, but for the scales
    one = 256 * 512 / GIB  # the transposed weight of one linear
    assert ours.phases[2].activations == pytest.approx(theirs.phases[2].activations + one)
    assert ours.explanations["parameters"].endswith("fp8, bfloat16, float32, over 2 workers")


def test_memory_flops_and_parameters_know_the_smaller_weights(tmp_path):
    shapes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 96}
    job = job_of(tmp_path, shapes=shapes)
    plain = job_for(tmp_path / "model", tmp_path / "plain", **{**KEYS, "quantization_bit": None})
    model, base = build(job), build(plain)
    Transforms(job).prepare(model, CPU)
    Transforms(plain).prepare(base, CPU)
    assert num_weights(model) == num_weights(base)
    assert training_flops_per_token(model, 64) == training_flops_per_token(base, 64)
    ours, theirs = (
        memory.predict(m, j, world_size=2, seq_len=64, batch=1)
        for m, j in ((model, job), (base, plain))
    )
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    assert ours.parameters == held / 2 / GIB
    linears = sum(m.in_features * m.out_features for _, m in packed_linears(model))
    saved = (theirs.parameters - ours.parameters) * 2 * GIB
    assert saved == pytest.approx(linears * (16 - 4.13) / 8, rel=5e-3)
    assert ours.gathered < theirs.gathered
    one = 256 * 512 * 2 / GIB
    assert ours.phases[2].activations == pytest.approx(theirs.phases[2].activations + one)
    assert ours.explanations["parameters"].endswith("nf4, bfloat16, float32, over 2 workers")
