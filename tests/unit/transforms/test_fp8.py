"""FP8's rules and plan, and that what is planned is what happens; no GPU needed."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from raytrain_adv import hardware
from raytrain_adv.data.batches.collate import collate, pad_to
from raytrain_adv.data.batches.sequences import Sequence
from raytrain_adv.errors import ClusterError, JobError, TrainingError
from raytrain_adv.estimate.counted import kept_by_layers
from raytrain_adv.model.build import build
from raytrain_adv.transforms import loss_kernel
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.fp8 import BECOMES, EXPERTS, HEAD, Fp8, _avoid_nan
from raytrain_adv.transforms.modules import class_name
from raytrain_adv.transforms.transform import Change, Plan
from tests.tiny_models import job_for, write_checkpoint

CPU = hardware.detect("cpu")
H100 = replace(
    CPU,
    device_type="cuda",
    device_name="NVIDIA H100 80GB HBM3",
    compute_capability=(9, 0),
    num_gpus=8,
    node_ip="10.0.3.9",
)
A100 = replace(H100, device_name="NVIDIA A100-SXM4-80GB", compute_capability=(8, 0))
KEYS = {"fp8": True, "fp8_allow_cpu": True, "fp8_min_features": 0, "finetuning_type": "full"}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 96}


def planned(tmp_path, kind="llama", shapes=WIDE, **keys):
    folder = write_checkpoint(kind, tmp_path / "model", **shapes)
    job = job_for(folder, tmp_path, **{**KEYS, **keys})
    model = build(job)
    return job, model, Transforms(job).plan(model, CPU)["fp8"]


@pytest.mark.parametrize(
    "facts, rule",
    [
        (A100, "FP8 requires Hopper architecture (compute capability 9.0 or newer)"),
        (CPU, "FP8 requires Hopper architecture (compute capability 9.0 or newer)"),
        (replace(H100, versions={"torch": "2.6.1", "torchao": "0.18.0"}), "FP8 requires PyTorch"),
        (replace(H100, versions={"torch": "2.11.0+cu130", "torchao": None}), "torchao not avail"),
    ],
)
def test_a_machine_without_fp8_is_refused_by_rule_and_name(facts, rule):
    with pytest.raises(ClusterError) as refusal:
        Fp8(fp8=True).check(facts)
    assert rule in refusal.value.what
    assert facts.node_ip in refusal.value.found
    assert refusal.value.fix
    assert ("fp8_allow_cpu: true" in refusal.value.fix) is (facts is CPU)


def test_linears_too_small_are_no_reason_before_a_machine_without_fp8(tmp_path):
    job = job_for(write_checkpoint("llama", tmp_path / "model", **WIDE), tmp_path, fp8=True)
    with pytest.raises(JobError) as here:
        Transforms(job).plan(build(job), CPU)
    assert here.value.what.startswith("FP8 requires Hopper architecture")
    assert "no GPU" in here.value.found and "too small to gain" in here.value.found
    assert here.value.fix.startswith("run on H100/H200 workers")
    with pytest.raises(JobError, match=r"^fp8 is enabled but would not change any module"):
        Transforms(job).plan(build(job), H100)


def test_hopper_and_newer_are_taken_and_a_cpu_only_on_request():
    Fp8(fp8=True).check(H100)
    Fp8(fp8=True).check(replace(H100, compute_capability=(10, 0)))
    Fp8(fp8=True, fp8_allow_cpu=True).check(CPU)
    with pytest.raises(ClusterError):
        Fp8(fp8=True, fp8_allow_cpu=True).check(A100)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_each_size_are_tested_where_they_train(recipe, dtype, tmp_path):
    folder = write_checkpoint("llama", tmp_path / "model", **WIDE)
    job = job_for(folder, tmp_path, **KEYS, fp8_recipe=recipe)
    model = build(job)
    plans = Transforms(job).prepare(model, CPU)
    planned = plans["fp8"].notes
    found = Transforms(job).install(model, plans, torch.device("cpu"), dtype)["fp8"].notes
    assert found[:-1] == planned and found[-1].startswith("tested on cpu in ")
    off = [float(number) for number in re.findall(r"by (\d\S+),", found[-1])]
    assert len(off) == 2 and all(0.01 < number < 0.1 for number in off)


def test_products_that_come_out_wrong_stop_the_run(tmp_path, monkeypatch):
    """A transposed cast that was compiled wrongly gave weight gradients of other numbers."""
    from raytrain_adv.ops.float8 import linear

    folder = write_checkpoint("llama", tmp_path / "model", **WIDE)
    job = job_for(folder, tmp_path, **KEYS)
    model = build(job)
    plans = Transforms(job).prepare(model, CPU)

    def both(tensor, scale, dtype):
        plain = linear.cast(tensor, scale, dtype)
        return plain, plain.t().contiguous().view(torch.uint8).roll(1, 0).view(dtype)

    monkeypatch.setattr(linear, "cast_both", both)
    with pytest.raises(TrainingError, match="FP8 gives wrong results") as refusal:
        Transforms(job).install(model, plans, torch.device("cpu"), torch.bfloat16)
    assert "gradients by 1.4" in refusal.value.found and "set fp8: false" in refusal.value.fix


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_next_to_qat_the_linears_that_round_are_tested(tmp_path, monkeypatch, weights):
    """The class that trains, and not that of FP8 alone."""
    from raytrain_adv.ops.float8 import qat_linear

    folder = write_checkpoint("llama", tmp_path / "model", **WIDE)
    qat = {"enable_qat": True, "qat_weight_dtype": weights, "qat_activation_dtype": "int8"}
    job = job_for(folder, tmp_path, **KEYS, **qat)
    model = build(job)
    plans = Transforms(job).prepare(model, CPU)
    cpu, dtype = torch.device("cpu"), torch.bfloat16
    assert "tested on cpu" in Transforms(job).install(model, plans, cpu, dtype)["fp8"].notes[-1]

    def nothing(left, right, *_, **__):
        return left.new_zeros(left.shape[0], right.shape[0], dtype=dtype)

    monkeypatch.setattr(qat_linear, "product", nothing)
    with pytest.raises(TrainingError, match="FP8 gives wrong results"):
        Transforms(job).install(model, plans, cpu, dtype)


def test_a_machine_that_cannot_try_it_out_raises_an_error_in_the_usual_form(tmp_path, monkeypatch):
    from raytrain_adv.ops.float8 import linear

    folder = write_checkpoint("llama", tmp_path / "model", **WIDE)
    job = job_for(folder, tmp_path, **KEYS)
    model = build(job)
    plans = Transforms(job).prepare(model, CPU)

    def broken(*_):
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(linear, "cast_both", broken)
    with pytest.raises(TrainingError) as refusal:
        Transforms(job).install(model, plans, torch.device("cpu"), torch.bfloat16)
    assert refusal.value.found == "RuntimeError: Failed to find C compiler."


def test_a_run_on_cpus_is_refused_when_the_file_is_read(tmp_path):
    keys = {**KEYS, "use_cpu": True}
    assert job_for(tmp_path, tmp_path, **keys).parallel.use_cpu
    with pytest.raises(JobError, match="fp8 and use_cpu"):
        job_for(tmp_path, tmp_path, **{**keys, "fp8_allow_cpu": False})


def test_fp8_all_gather_is_refused_by_name_with_another_recipe(tmp_path):
    keys = {**KEYS, "fp8_enable_fsdp_float8_all_gather": True, "fp8_recipe": "rowwise"}
    with pytest.raises(JobError) as refusal:
        job_for(tmp_path, tmp_path, **keys)
    message = str(refusal.value)
    assert "fp8_enable_fsdp_float8_all_gather" in message and "rowwise" in message


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_a_head_with_gradients_in_fp8_computes_the_loss(tmp_path, tied, recipe):
    shapes = {**WIDE, "tie_word_embeddings": tied}
    keys = {"fp8_lm_head": True, "fp8_recipe": recipe, "fp8_min_features": 512}
    job, model, plan = planned(tmp_path, shapes=shapes, **keys)
    plans = Transforms(job).prepare(model, CPU)
    assert list(plan.changes) == ["lm_head"] and class_name(model.lm_head) == HEAD
    assert plans["loss_kernel"].changes["lm_head"].after == f"{HEAD} with the chunked loss"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"loss_kernel": "torch"}, "fp8_lm_head and loss_kernel"),
        ({"cut_cross_entropy": True, "bf16": True}, "fp8_lm_head and cut_cross_entropy"),
        ({"use_dft_loss": True}, "fp8_lm_head and loss_kernel"),
    ],
)
def test_a_head_without_the_chunked_loss_is_refused(tmp_path, other, named):
    with pytest.raises(JobError, match=named):
        job_for(tmp_path, tmp_path, **{**KEYS, "fp8_lm_head": True, **other})


def test_a_head_that_cannot_is_an_error_and_no_bf16_head(tmp_path):
    with pytest.raises(JobError, match="lm_head: 64 x 97: not divisible by 16"):
        planned(tmp_path, shapes={**WIDE, "vocab_size": 97}, fp8_lm_head=True)


def test_a_head_whose_model_allows_no_chunked_loss_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(loss_kernel, "_besides", lambda *parts: "adds a loss of its own")
    with pytest.raises(JobError, match="adds a loss of its own") as refusal:
        planned(tmp_path, fp8_lm_head=True)
    assert "set fp8_lm_head: false" in refusal.value.fix


def test_head_and_layers_of_odd_sizes_stay(tmp_path):
    _, _, plan = planned(tmp_path, shapes={**WIDE, "intermediate_size": 120})
    assert plan.skipped["lm_head"] == "the language-model head"
    reason = plan.skipped["model.layers.0.mlp.up_proj"]
    assert "64 x 120" in reason and "16" in reason
    assert len(plan.changes) == 8  # four of attention, in two layers


def test_small_layers_stay_unless_enabled(tmp_path):
    _, _, plan = planned(tmp_path, fp8_min_features=48)
    small = {fqn for fqn, reason in plan.skipped.items() if "too small to gain" in reason}
    names = ("k_proj", "v_proj")
    assert small == {f"model.layers.{n}.self_attn.{p}" for n in (0, 1) for p in names}
    with pytest.raises(JobError, match="would not change any module"):
        planned(tmp_path, fp8_min_features=None)


@pytest.mark.parametrize(
    "patterns", ["down_proj", ["model.layers.*.mlp.down_proj"], "mlp.down_proj, lm_head"]
)
def test_excluded_layers_stay(tmp_path, patterns):
    _, _, plan = planned(tmp_path, fp8_exclude=patterns)
    left = [fqn for fqn, reason in plan.skipped.items() if reason == "in fp8_exclude"]
    assert left == [f"model.layers.{n}.mlp.down_proj" for n in (0, 1)]


def test_an_exclude_that_matches_nothing_is_an_error_that_names_the_nearest(tmp_path):
    with pytest.raises(JobError, match="fp8_exclude down_prj matches no linear") as refusal:
        planned(tmp_path, fp8_exclude="down_prj")
    assert "down_proj" in refusal.value.fix


def test_routers_and_adapters_stay(tmp_path):
    shapes = {"hidden_size": 64, "num_experts": 16, "shared_expert_intermediate_size": 32}
    _, _, plan = planned(tmp_path, "qwen2_moe", shapes)
    routers = [fqn for fqn in plan.skipped if fqn.endswith(("gate", "shared_expert_gate"))]
    assert routers and all("gate_proj" not in fqn for fqn in routers)
    assert any(fqn.endswith("shared_expert.gate_proj") for fqn in plan.changes)
    stays = plan.skipped["model.layers.0.mlp.experts"]
    assert "products of 16 experts of " in stays and "on an H200" in stays


MIXTRAL = {"num_local_experts": 8, "hidden_size": 4096, "intermediate_size": 14336}
FEW = {"num_local_experts": 4, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 96}
STACKS = [f"model.layers.{n}.mlp.experts" for n in (0, 1)]


def mixture(tmp_path, kind, shapes, num_tokens=8192, fp8_experts="auto", **keys):
    """Return the plan of a mixture of which only the config is there."""
    folder = tmp_path / "config"
    config = AutoConfig.for_model(kind, num_hidden_layers=2, **shapes)
    config.save_pretrained(folder)
    (folder / "model.safetensors").touch()
    job = job_for(folder, tmp_path, **{**KEYS, "fp8_experts": fp8_experts, **keys})
    return Transforms(job).plan(build(job), CPU, num_tokens)["fp8"]


@pytest.mark.parametrize(
    ("kind", "shapes", "num_tokens", "told"),
    [
        ("mixtral", MIXTRAL, 8192, "8 experts of 28672 x 4096 and 4096 x 14336, about 2,048 rows"),
        ("mixtral", MIXTRAL, 2048, "about 512 rows each, are 0.64 x as fast in FP8 as in bf16"),
        ("qwen3_moe", {}, 8192, "about 512 rows each, are 0.48 x as fast in FP8 as in bf16"),
        ("gpt_oss", {}, 8192, "about 256 rows each, are 0.38 x as fast in FP8 as in bf16"),
        ("gpt_oss", {"num_local_experts": 32}, 8192, "about 1,024 rows each, are 0.82 x as fast"),
    ],
)
def test_experts_are_in_fp8_where_it_was_measured_to_gain(tmp_path, kind, shapes, num_tokens, told):
    plan = mixture(tmp_path, kind, shapes, num_tokens)
    gains = shapes is MIXTRAL and num_tokens == 8192
    texts = plan.notes if gains else [plan.skipped[fqn] for fqn in STACKS]
    assert any(told in text for text in texts), texts
    assert [f for f, c in plan.changes.items() if c.after == EXPERTS] == (STACKS if gains else [])
    assert any("experts (" in note for note in plan.notes) is not gains
    assert not any(fqn.endswith(("gate", "router")) for fqn in plan.changes)


def test_experts_are_in_fp8_if_the_key_forces_it_and_the_plan_names_the_cost(tmp_path):
    plan = mixture(tmp_path, "mixtral", FEW, fp8_experts=True)
    assert plan.changes.keys() >= set(STACKS)
    assert any(note.startswith("fp8_experts: true makes experts slower") for note in plan.notes)
    off = mixture(tmp_path, "mixtral", MIXTRAL, fp8_experts=False)
    assert all("fp8_experts: false" in off.skipped[fqn] for fqn in STACKS)
    excluded = mixture(tmp_path, "mixtral", MIXTRAL, fp8_exclude="model.layers.0.mlp.experts")
    assert excluded.skipped[STACKS[0]] == "in fp8_exclude" and STACKS[1] in excluded.changes


@pytest.mark.parametrize(
    ("shapes", "keys", "why"),
    [
        ({**FEW, "intermediate_size": 100}, {}, "not divisible by 16"),
        (FEW, {"finetuning_type": "lora"}, "with adapters"),
        (FEW, {"fp8_exclude": "experts"}, "in fp8_exclude"),
    ],
)
def test_experts_that_cannot_be_in_fp8_are_refused_if_it_is_forced(tmp_path, shapes, keys, why):
    plan = mixture(tmp_path, "mixtral", shapes, **keys)
    assert all(any(why in t for f, t in plan.skipped.items() if fqn in f) for fqn in STACKS)
    with pytest.raises(JobError, match=why) as refusal:
        mixture(tmp_path, "mixtral", shapes, **keys, fp8_experts=True)
    assert "set fp8_experts: auto" in refusal.value.fix


def test_a_model_without_experts_refuses_the_key_that_forces_them(tmp_path):
    with pytest.raises(JobError, match="no stacked experts"):
        planned(tmp_path, fp8_experts=True)


def test_frozen_experts_and_those_that_qat_rounds_stay_in_bf16(tmp_path):
    lora = {"finetuning_type": "lora", "lora_target": "q_proj"}
    frozen = mixture(tmp_path, "mixtral", MIXTRAL, **lora)
    assert all(frozen.skipped[fqn].startswith("frozen experts") for fqn in STACKS)
    qat = {"enable_qat": True, "qat_group_size": 16}
    rounded = mixture(tmp_path, "mixtral", MIXTRAL, **qat)
    assert all("rounded values QAT" in rounded.skipped[fqn] for fqn in STACKS)
    with pytest.raises(JobError, match="fp8_experts and enable_qat"):
        mixture(tmp_path, "mixtral", FEW, **qat, fp8_experts=True)
    with pytest.raises(JobError, match="fp8_experts"):
        job_for(tmp_path, tmp_path, **KEYS, fp8_experts="always")


def test_experts_are_tried_before_training_and_proven_by_their_own_operator(tmp_path, monkeypatch):
    from raytrain_adv.ops.float8 import grouped

    job, model, plan = planned(tmp_path, "mixtral", FEW, fp8_experts=True)
    transforms = Transforms(job)
    plans = transforms.prepare(model, CPU)
    own = {f for f, c in plan.changes.items() if c.proven_by == "aten::_scaled_grouped_mm"}
    assert own == set(STACKS)
    cpu, dtype = torch.device("cpu"), torch.bfloat16
    assert "tested on cpu" in transforms.install(model, plans, cpu, dtype)["fp8"].notes[-1]
    right = grouped._by_row
    monkeypatch.setattr(grouped, "_by_row", lambda x: (right(x)[0], right(x)[1].roll(1, 0)))
    with pytest.raises(TrainingError, match="FP8 gives wrong results") as refusal:
        transforms.install(model, plans, cpu, dtype)
    assert refusal.value.found.startswith("experts of 192 x 64: values off by")


@pytest.mark.parametrize("excluded", ["down_proj", "model.layers.0.mlp.down_proj"])
def test_under_adapters_names_are_the_models_own_and_the_head_stays(tmp_path, excluded):
    lora = {"finetuning_type": "lora", "lora_target": "q_proj,down_proj,lm_head"}
    _, _, plan = planned(tmp_path, **lora, fp8_exclude=excluded)
    assert plan.skipped["model.layers.0.mlp.down_proj.base_layer"] == "in fp8_exclude"
    assert plan.skipped["lm_head.base_layer"] == "the language-model head"
    assert "model.layers.0.self_attn.q_proj.base_layer" in plan.changes


def test_lora_on_an_fp8_base(tmp_path):
    _, _, plan = planned(tmp_path, finetuning_type="lora", lora_rank=16)
    assert all(fqn.endswith("base_layer") for fqn in plan.changes)
    adapters = [fqn for fqn, reason in plan.skipped.items() if reason == "an adapter"]
    assert len(adapters) == 2 * len(plan.changes)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_what_is_planned_is_what_the_model_becomes(tmp_path, recipe):
    job, model, plan = planned(tmp_path, fp8_recipe=recipe)
    plans = Transforms(job).prepare(model, CPU)
    assert plans["fp8"].changes.keys() == plan.changes.keys()
    found = {
        fqn
        for fqn, m in model.named_modules()
        if f"{type(m).__module__}.{type(m).__qualname__}" == BECOMES[recipe]
    }
    assert found == plan.changes.keys()


def test_a_layer_that_was_not_converted_is_noticed(tmp_path, monkeypatch):
    job, model, _ = planned(tmp_path)
    prepare = Fp8.prepare

    def forgets_one(self, model, plan):
        prepare(self, model, plan)
        model.set_submodule("model.layers.1.mlp.up_proj", nn.Linear(64, 128, bias=False))

    monkeypatch.setattr(Fp8, "prepare", forgets_one)
    with pytest.raises(TrainingError, match="fp8 did not do what it had planned") as error:
        Transforms(job).prepare(model, CPU)
    assert "model.layers.1.mlp.up_proj" in error.value.found


def test_parameters_keep_their_names_and_dtype(tmp_path):
    job, model, _ = planned(tmp_path)
    before = {name: p.dtype for name, p in model.named_parameters()}
    Transforms(job).prepare(model, CPU)
    assert {name: p.dtype for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("lengths", [[3], [17, 40], [100, 5, 61]])
@pytest.mark.parametrize("changed", [{}, {"packing": True}, {"torch_compile": True}])
def test_every_batch_has_a_number_of_tokens_that_fp8_can_multiply(make_job, lengths, changed):
    """A GPU needs the tokens of a pass to be divisible by 16; a CPU would not notice."""
    job = make_job(cutoff_len=100, **changed)
    sequences = [Sequence(torch.arange(n).numpy(), torch.arange(n).numpy(), (n,)) for n in lengths]
    batch = collate(sequences, pad_token_id=0, pad_to=pad_to(job), neat=False)
    assert batch["input_ids"].numel() % 16 == 0
    assert batch["input_ids"].shape[1] % 16 == 0


def test_advice_names_what_makes_fp8_slow(make_job):
    def advice(num_tokens, **keys):
        job = make_job(fp8=True, fp8_allow_cpu=True, fp8_min_features=16, **keys)
        notes = Transforms(job).plan(build(job), CPU, num_tokens)["fp8"].notes
        return [note for note in notes if "slower than bf16" in note]

    eager = advice(1024)
    assert any("torch_compile" in sentence for sentence in eager)
    assert any("1,024 tokens" in sentence for sentence in eager)
    assert advice(8192, torch_compile=True) == []


def test_fp8_and_qat_compile_with_kernels_and_liger(make_job):
    """It was refused while Liger's layers were compiled wrongly; tests/gpu trains it."""
    keys = {
        "fp8": True,
        "bf16": True,
        "enable_qat": True,
        "qat_weight_dtype": "int4",
        "qat_group_size": 32,
    }
    both = {"use_kernels": True, "use_liger_kernel": True, "torch_compile": True}
    assert make_job(**keys, **both).parallel.torch_compile


@pytest.fixture
def inductor(monkeypatch):
    """Give Inductor's code of minimum and maximum back after the test."""
    from torch._inductor.codegen.triton import TritonOverrides
    from torchao.float8 import _inductor_patch

    for name in ("minimum", "maximum"):
        monkeypatch.setattr(TritonOverrides, name, staticmethod(lambda a, b: "PropagateNan"))
    monkeypatch.setattr(_inductor_patch, "_PATCHED", False)
    return TritonOverrides


@pytest.mark.parametrize(("version", "is_avoided"), [("2.13.0+cu130", False), ("2.14.0", True)])
def test_compiled_rowwise_fp8_avoids_the_minimum_that_writes_nan(inductor, version, is_avoided):
    """triton-lang/triton#11111: from_float alone, as here, leaves torchao's workaround out."""
    _avoid_nan(version)
    code = inductor.minimum("a", "b") + inductor.maximum("a", "b")
    assert ("tl.where" in code) is is_avoided


def test_a_torch_that_the_workaround_does_not_fit_is_refused(inductor, monkeypatch):
    from torchao.float8 import _inductor_patch

    monkeypatch.setattr(_inductor_patch, "_patch_inductor_min_max_codegen", lambda: None)
    with pytest.raises(TrainingError, match="11111") as refused:
        _avoid_nan("2.15.0")
    assert "fp8_recipe: tensorwise" in refused.value.fix


def test_the_recipe_with_torchaos_casts_alone_needs_it(monkeypatch):
    seen = []
    monkeypatch.setattr("raytrain_adv.transforms.fp8._avoid_nan", seen.append)
    for recipe in ("tensorwise", "rowwise", "rowwise_with_gw_hp"):
        model = nn.Sequential(nn.Linear(16, 16))
        plan = Plan("fp8", {"0": Change("a", "b")})
        Fp8(fp8=True, fp8_recipe=recipe).prepare(model, plan)
        assert len(seen) == (recipe == "rowwise_with_gw_hp")


def test_compiled_layers_are_counted_to_keep_the_results_of_experts_in_fp8(tmp_path):
    """An operator that the count did not know as costly seemed to be computed again."""
    kept = []
    for experts in (True, False):
        job, model, _ = planned(tmp_path / str(experts), "mixtral", FEW, fp8_experts=experts)
        Transforms(job).prepare(model, CPU)
        kept += kept_by_layers(model, torch.bfloat16, False, 4096)[:1]
    assert kept[0].compiled == pytest.approx(kept[1].compiled, rel=0.15)
    assert kept[0].products == pytest.approx(kept[1].products, rel=0.05)
