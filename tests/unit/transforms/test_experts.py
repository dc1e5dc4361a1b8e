"""Stacked experts in LoRA and QAT: found by what they are, each expert as a linear, on shards."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from raytrain_adv import hardware
from raytrain_adv.config import JobConfig
from raytrain_adv.dtensor import gather, plain_name
from raytrain_adv.errors import JobError
from raytrain_adv.export.merge import merged_tensors
from raytrain_adv.export.model_folder import export_model
from raytrain_adv.model import parallel
from raytrain_adv.model.build import build
from raytrain_adv.model.weights import load_pretrained, materialize
from raytrain_adv.ops.bitsandbytes.experts import PackedStack
from raytrain_adv.ops.bitsandbytes.linear import PackedLinear, packed_linears
from raytrain_adv.ops.experts.find import layout_of, routers, stacked
from raytrain_adv.ops.experts.grouped import GroupedExperts, adapted
from raytrain_adv.ops.fake_quant.experts import FakeQuantizedExperts
from raytrain_adv.ops.fake_quant.layers import FakeQuantizedLinear
from raytrain_adv.ops.fake_quant.rounding import fake_quantize_float8
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.modules import short
from tests.families import tiny_config
from tests.ranks import run_ranks
from tests.tiny_models import job_for, write_checkpoint

CPU = torch.device("cpu")
TOKENS = torch.arange(24).reshape(2, 12)
LORA = {"finetuning_type": "lora", "lora_rank": 4}
MIXTURES = ["mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss", "llama4_text", "deepseek_v3"]
MIXTURES += ["gemma4_text"]
WITHOUT = ["llama", "qwen3_5_text", "recurrent_gemma"]


def prepared(job: JobConfig) -> PreTrainedModel:
    model = build(job)
    plans = Transforms(job).prepare(model, hardware.detect(CPU))
    parallel.shard(model, job, parallel.build_mesh(job, CPU))
    materialize(model, CPU)
    load_pretrained(model, job, CPU)
    Transforms(job).initialize(model, plans, 3)
    return model


def train(model: PreTrainedModel, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        logits = model(input_ids=TOKENS).logits.float()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", MIXTURES)
def test_grouped_experts_compute_the_same_bits_as_transformers(kind: str, tmp_path: Path) -> None:
    folder = write_checkpoint(kind, tmp_path / "m")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = model(input_ids=TOKENS, use_cache=False).logits
    found = stacked(model)
    assert found and all(layout_of(module) for module in found.values())
    for fqn, module in found.items():
        model.set_submodule(fqn, GroupedExperts.of(module))
    assert torch.equal(model(input_ids=TOKENS, use_cache=False).logits, wanted)


@pytest.mark.parametrize("kind", WITHOUT)
def test_a_model_without_experts_is_not_told_about_them(kind: str, tmp_path: Path) -> None:
    job = job_for(write_checkpoint(kind, tmp_path / "m"), tmp_path, **LORA)
    model = build(job)
    assert not stacked(model) and not routers(model)
    plan = Transforms(job).plan(model)["lora"]
    assert not any("expert" in text for text in [*plan.notes, *plan.skipped.values()])


@pytest.mark.parametrize(
    ("kind", "router"),
    [
        ("gemma4_text", "model.layers.0.router.proj"),
        ("llama4_text", "model.layers.0.feed_forward.router"),
        ("qwen2_moe", "model.layers.0.mlp.shared_expert_gate"),
    ],
)
@pytest.mark.parametrize("feature", ["lora", "qat", "qlora"])
def test_routers_are_left_whatever_their_last_name(
    kind: str, router: str, feature: str, tmp_path: Path
) -> None:
    keys = {
        "lora": LORA,
        "qat": {"enable_qat": True, "qat_group_size": None},
        "qlora": {**LORA, "lora_target": "o_proj", "quantization_bit": 8},
    }[feature]
    job = job_for(write_checkpoint(kind, tmp_path / "m"), tmp_path, **keys)
    plan = Transforms(job).plan(build(job))[feature]
    assert router not in plan.changes
    assert "routes tokens" in plan.skipped[router] or "not a plain linear" in plan.skipped[router]


@pytest.mark.parametrize(
    ("kind", "router"),
    [
        ("dbrx", "transformer.blocks.0.ffn.router.layer"),
        ("inkling_text", "model.layers.0.mlp.gate"),
        ("longcat_flash", "model.layers.0.mlp.router.classifier"),
        ("zaya", "model.layers.0.mlp.gate.router_mlp.fc1"),
    ],
)
def test_routers_of_several_linears_or_with_more_outputs_than_experts_are_left(
    kind: str, router: str, tmp_path: Path
) -> None:
    tiny_config(kind).save_pretrained(tmp_path / "m")
    (tmp_path / "m/model.safetensors").touch()  # no weight is read for a plan
    small = {"fp8_min_features": 0, "fp8_allow_cpu": True}
    qat = {"enable_qat": True, "qat_group_size": None}
    for name, keys in {"lora": LORA, "fp8": {"fp8": True, **small}, "qat": qat}.items():
        job = job_for(tmp_path / "m", tmp_path, **keys)
        plan = Transforms(job).plan(build(job))[name]
        assert router not in plan.changes
        assert plan.skipped[router] == "it routes tokens to experts", name


@pytest.mark.parametrize("kind", MIXTURES)
def test_adapters_on_experts_give_peft_and_transformers_the_same_logits(
    kind: str, tmp_path: Path
) -> None:
    folder, out = write_checkpoint(kind, tmp_path / "m"), tmp_path / "out"
    job = job_for(folder, tmp_path, **LORA)
    model = prepared(job)
    losses = train(model)
    assert losses[-1] < losses[0]
    export_model(model, job, out)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    untouched = base(TOKENS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_peft = PeftModel.from_pretrained(base, out).eval()
    adapted = [n for n, _ in by_peft.named_parameters() if ".experts." in n and "lora_B" in n]
    assert len(adapted) == 2 * len(stacked(build(job)))
    by_transformers = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model.eval()(TOKENS).logits
        assert (wanted - untouched).abs().max() > 0.1
        for again in (by_peft, by_transformers):
            torch.testing.assert_close(again(TOKENS).logits, wanted, rtol=1e-4, atol=1e-5)


def trained_on_rank(jobs: list[JobConfig]) -> list[dict[str, Any]]:
    found = []
    for job in jobs:
        model = prepared(job)
        losses = train(model)
        named = model.named_parameters()
        trained = {plain_name(n): gather(p).detach() for n, p in named if p.requires_grad}
        found.append({"losses": losses, **trained})
    return found


def test_two_ranks_train_experts_as_one(tmp_path: Path) -> None:
    qat = {"enable_qat": True, "qat_weight_dtype": "int4", "qat_group_size": 8}
    jobs = [
        job_for(write_checkpoint(kind, tmp_path / kind), tmp_path / f"{kind}{n}", **keys)
        for kind, each in (("mixtral", [LORA, qat]), ("qwen3_moe", [{**LORA, **qat}]))
        for n, keys in enumerate(each)
    ]
    fp8 = {"fp8": True, "fp8_allow_cpu": True, "fp8_experts": True, "finetuning_type": "full"}
    wide = write_checkpoint("mixtral", tmp_path / "wide", intermediate_size=48)
    jobs.append(job_for(wide, tmp_path / "fp8", **fp8, fp8_min_features=512))
    alone = trained_on_rank(jobs)
    assert all(any("experts" in name for name in one) for one in alone)
    for found in run_ranks(trained_on_rank, 2, tmp_path, jobs):
        torch.testing.assert_close(found, alone, rtol=1e-3, atol=1e-4)


def test_names_of_an_experts_linears_mean_the_stacked_matrix(tmp_path: Path) -> None:
    folder = write_checkpoint("mixtral", tmp_path / "m")
    job = job_for(folder, tmp_path, **LORA, lora_target="q_proj,w2")
    model = build(job)
    plan = Transforms(job).prepare(model)["lora"]
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "experts" in n}
    assert plan.changes.keys() >= {"model.layers.0.mlp.experts"}
    assert len(trained) == 4  # A and B of down_proj in two layers


@pytest.mark.parametrize("key", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_what_peft_cannot_do_with_experts_is_named(key: dict[str, Any], tmp_path: Path) -> None:
    folder = write_checkpoint("qwen3_moe", tmp_path / "m")
    job = job_for(folder, tmp_path, **LORA, **key)
    plan = Transforms(job).plan(build(job))["lora"]
    assert next(iter(key)) in plan.skipped["model.layers.0.mlp.experts"]
    assert any("warning: under half" in note and "experts" in note for note in plan.notes)
    named = job_for(folder, tmp_path, **LORA, **key, lora_target="experts")
    with pytest.raises(JobError, match=next(iter(key))):
        Transforms(named).plan(build(named))


def _straight_through(x: torch.Tensor) -> torch.Tensor:
    return x + (fake_quantize_float8(x) - x).detach()


FORMS = [("int4", 8, ""), ("int8", 8, "int8"), ("int2", None, ""), ("float8_e4m3fn", None, "")]
FORMS += [("float8_e4m3fn", None, "float8_e4m3fn")]


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(("weights", "group", "activations"), FORMS)
def test_each_expert_rounds_as_a_linear(
    weights: str, group: int | None, activations: str, kind: str, tmp_path: Path
) -> None:
    folder = write_checkpoint(kind, tmp_path / "m")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    experts = FakeQuantizedExperts.rounding(
        next(iter(stacked(model).values())), weights, group, activations
    )
    torch.manual_seed(0)
    ends = torch.tensor([3, 3, 9, 12], dtype=torch.int32)
    weight = experts.get_parameter("down_proj")
    transposed = experts.layout.is_transposed
    out, width = weight.shape[1:][::-1] if transposed else weight.shape[1:]
    x, gradient = torch.randn(12, width, requires_grad=True), torch.randn(12, out)
    found = experts.multiply("down_proj", x, ends)
    found_grads = torch.autograd.grad(found, (x, weight), gradient)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if start == end:
            assert not found_grads[1][expert].any()
            continue
        own = weight[expert].mT if transposed else weight[expert]
        plain = nn.Linear(width, out, bias=False)
        plain.weight = nn.Parameter(own.detach().clone())
        linear = FakeQuantizedLinear.of(plain, weights, group, activations)
        rows = x[start:end].detach().requires_grad_()
        if activations.startswith("float8"):  # whose linear multiplies on a GPU alone
            wanted = F.linear(_straight_through(rows), _straight_through(linear.weight))
        else:
            wanted = linear(rows)
        grads = torch.autograd.grad(wanted, (rows, linear.weight), gradient[start:end])
        torch.testing.assert_close(found[start:end], wanted)
        torch.testing.assert_close(found_grads[0][start:end], grads[0])
        of_weight = found_grads[1][expert]
        torch.testing.assert_close(of_weight.mT if transposed else of_weight, grads[1])
        start = end


NF4 = {**LORA, "bf16": True, "quantization_bit": 4}
FLOAT8 = {"quantization_bit": 8, "quantization_type": "fp8", "quantization_allow_cpu": True}
BLOCKS = {"quantization_bit": 8, "quantization_type": "fp8_blocks"}
WIDE = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize(
    "keys",
    [{}, {"double_quantization": False}, {"quantization_bit": 8}, FLOAT8, BLOCKS],
    ids=["nested", "plain", "int8", "float8", "blocks"],
)
def test_each_expert_is_held_as_a_linear(kind: str, keys: dict[str, Any], tmp_path: Path) -> None:
    folder = write_checkpoint(kind, tmp_path / "m", **WIDE)
    job = job_for(folder, tmp_path, **{**NF4, **keys})
    model = prepared(job)
    held = {f: m for f, m in packed_linears(model) if isinstance(m, PackedStack)}
    assert len(held) == 4 and not stacked_in_bf16(model)
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for fqn, stack in held.items():
        original = plain.get_parameter(plain_name(fqn))
        whole = stack.unpacked()
        assert whole.shape == original.shape
        for expert in range(len(original)):
            own = original[expert].t() if stack.is_transposed else original[expert]
            with torch.device("meta"):
                linear = nn.Linear(own.shape[1], own.shape[0], bias=False, dtype=torch.bfloat16)
            packed = PackedLinear.of(linear, stack.form).to_empty(device=CPU)
            packed.take(own, CPU)
            found = whole[expert].t() if stack.is_transposed else whole[expert]
            assert torch.equal(found, packed.unpacked())


def stacked_in_bf16(model: PreTrainedModel) -> list[str]:
    """Return stacks of experts that are parameters of 16 bits per weight."""
    return [n for n, p in model.named_parameters() if short(n) in ("gate_up_proj", "down_proj")]


@pytest.mark.slow
def test_packed_experts_train_on_two_ranks_as_on_one_and_are_merged(tmp_path: Path) -> None:
    folder = write_checkpoint("qwen3_moe", tmp_path / "m", **WIDE)
    job = job_for(folder, tmp_path, **NF4)
    (alone,) = trained_on_rank([job])
    for (found,) in run_ranks(trained_on_rank, 2, tmp_path, [job]):
        torch.testing.assert_close(found["losses"], alone["losses"], rtol=0.02, atol=0.02)
    model = prepared(job)
    train(model)
    value = merged_tensors(model)
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(value(name))
        found, wanted = plain(TOKENS).logits, model.eval()(TOKENS).logits.float()
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize(
    "keys",
    [
        {},
        LORA,
        {"enable_qat": True, "qat_activation_dtype": "int8", "qat_group_size": 8},
        NF4,
        {**NF4, **FLOAT8},
    ],
    ids=["full", "lora", "qat", "qlora", "float8"],
)
def test_a_layer_with_experts_compiles_into_one_graph(keys: dict[str, Any], tmp_path: Path) -> None:
    sizes = {**WIDE, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
    folder = write_checkpoint("gpt_oss", tmp_path / "m", **sizes)
    job = job_for(folder, tmp_path, gradient_checkpointing="none", **keys)
    eager = train(prepared(job))
    model: Any = prepared(job)
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(train(model), eager, rtol=1e-3, atol=1e-4)


def test_adapters_of_experts_are_multiplied_in_inductors_graphs_too() -> None:
    torch.manual_seed(0)
    x, ends = torch.randn(64, 32, dtype=torch.bfloat16), torch.tensor([16, 64], dtype=torch.int32)
    down, up = torch.randn(2 * 8, 32), torch.randn(48, 8 * 2)  # experts innermost, as in PEFT

    def product(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        factors = up.reshape(48, 8, 2).permute(2, 0, 1), down.reshape(2, 8, 32), 2.0
        return adapted(x, factors, ends, transposed=False)

    outputs = []
    for function in (product, torch.compile(product, fullgraph=True)):
        inputs = [one.clone().requires_grad_() for one in (x, down, up)]
        output = function(*inputs)
        outputs.append([output, *torch.autograd.grad(output.float().square().sum(), inputs)])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0.02, atol=0.1)
