"""Adapters: where they were planned, with the values to start from, in PEFT's own format."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from raytrain_adv import hardware
from raytrain_adv.config import JobConfig
from raytrain_adv.dtensor import gather, plain_name
from raytrain_adv.errors import JobError
from raytrain_adv.export.model_folder import export_model
from raytrain_adv.hardware import HardwareFacts
from raytrain_adv.model import parallel
from raytrain_adv.model.build import build
from raytrain_adv.model.weights import load_pretrained, materialize
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.lora import Lora
from tests.families import tiny_model
from tests.ranks import run_ranks
from tests.tiny_models import job_for, write_checkpoint

CPU = torch.device("cpu")
TOKENS = torch.arange(24).reshape(2, 12)
FORMS = [{}, {"use_rslora": True}, {"use_dora": True}, {"use_dora": True, "use_rslora": True}]


def lora_job(folder: Path, place: Path, **keys: Any) -> JobConfig:
    return job_for(
        folder, place, **{"finetuning_type": "lora", "lora_rank": 4, "bf16": True, **keys}
    )


def adapted(job: JobConfig, seed: int = 3) -> PreTrainedModel:
    model = build(job)
    plans = Transforms(job).prepare(model, hardware.detect(CPU))
    parallel.shard(model, job, parallel.build_mesh(job, CPU))
    materialize(model, CPU)
    load_pretrained(model, job, CPU)
    Transforms(job).initialize(model, plans, seed)
    return model


def train(model: PreTrainedModel, steps: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        logits = model(input_ids=TOKENS).logits.float()
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adapters(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {
        plain_name(n): gather(p).clone() for n, p in model.named_parameters() if p.requires_grad
    }


def test_all_means_every_linear_but_the_head(tmp_path: Path) -> None:
    job = lora_job(write_checkpoint("llama", tmp_path / "m"), tmp_path)
    plan = Transforms(job).plan(build(job))["lora"]
    assert len(plan.changes) == 14
    assert plan.skipped == {"lm_head": "the language-model head"}
    change = plan.changes["model.layers.0.self_attn.q_proj"]
    assert (change.before, change.after) == ("torch.nn.Linear", "peft.tuners.lora.layer.Linear")


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [
        ("falcon_h1", {"out_proj"}),
        ("mamba2", {"out_proj"}),
        ("mamba", {"out_proj", "dt_proj", "x_proj"}),
        ("nemotron_h", {"out_proj"}),
        ("jamba", {"dt_proj"}),
        ("gemma3n_text", {"correction_coefs"}),
        ("inkling2_text", {"weight_proj"}),
    ],
)
def test_each_default_adapter_gets_a_gradient_and_the_rest_is_named(
    kind: str, left_out: set[str], tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    tiny_model(kind).save_pretrained(folder)
    job = lora_job(folder, tmp_path, bf16=False)
    model = build(job)
    transforms = Transforms(job)
    plan = transforms.plan(model)["lora"]
    reasons = {
        f.rpartition(".")[2]: r for f, r in plan.skipped.items() if "reads" in r or "PEFT" in r
    }
    assert reasons.keys() == left_out
    for name in left_out:
        with pytest.raises(JobError, match=f"lora_target names {name}"):
            named = lora_job(folder, tmp_path, bf16=False, lora_target=f"all,{name}")
            Transforms(named).plan(model)
    model = adapted(job).train()
    model(input_ids=TOKENS % 32, use_cache=False).logits.square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_a_linear_whose_class_computes_another_product_gets_no_adapter(tmp_path: Path) -> None:
    tiny_model("deepseek_v4").save_pretrained(tmp_path / "m")
    job = lora_job(tmp_path / "m", tmp_path)
    plan = Transforms(job).plan(build(job))["lora"]
    kind = "transformers.models.deepseek_v4.modeling_deepseek_v4.DeepseekV4GroupedLinear"
    grouped = {f for f, reason in plan.skipped.items() if reason == f"a {kind}, not a plain linear"}
    assert grouped and all(fqn.endswith("o_a_proj") for fqn in grouped)


def test_what_is_named_next_to_all_is_not_left_out(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    job = lora_job(folder, tmp_path, lora_target="all,lm_head")
    plan = Transforms(job).plan(build(job))["lora"]
    assert "lm_head" in plan.changes and len(plan.changes) == 15 and not plan.skipped


def test_routers_get_no_adapters_and_stacked_experts_do(tmp_path: Path) -> None:
    job = lora_job(write_checkpoint("qwen2_moe", tmp_path / "m"), tmp_path)
    plan = Transforms(job).plan(build(job))["lora"]
    for router in ("gate", "shared_expert_gate"):
        assert plan.skipped[f"model.layers.0.mlp.{router}"] == "it routes tokens to experts"
    assert not any("gate" in fqn.split(".") for fqn in plan.changes)
    change = plan.changes["model.layers.0.mlp.experts"]
    assert change.after == "raytrain_adv.ops.experts.adapted.AdaptedExperts"


def test_the_noted_number_of_parameters_is_the_models(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    for form in FORMS:
        job = lora_job(folder, tmp_path, **form)
        model = build(job)
        note = Transforms(job).prepare(model)["lora"].notes[0]
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert note.startswith(f"{trainable:,} trainable parameters")


@pytest.mark.parametrize("target", ["q_proj,v_proj", ["q_proj", "v_proj"]])
def test_named_targets_and_no_others_are_adapted(target: Any, tmp_path: Path) -> None:
    job = lora_job(write_checkpoint("llama", tmp_path / "m"), tmp_path, lora_target=target)
    plan = Transforms(job).plan(build(job))["lora"]
    assert sorted({fqn.rpartition(".")[2] for fqn in plan.changes}) == ["q_proj", "v_proj"]
    assert plan.skipped["model.layers.0.mlp.up_proj"] == "not in lora_target"


def test_a_whole_name_adapts_one_module(tmp_path: Path) -> None:
    target = "model.layers.1.self_attn.q_proj"
    job = lora_job(write_checkpoint("llama", tmp_path / "m"), tmp_path, lora_target=target)
    assert list(Transforms(job).prepare(build(job))["lora"].changes) == [target]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("q_prj", "did you mean q_proj"),
        ("embed_tokens", "embed_tokens is not a linear module"),
        (",", "lora_target is empty"),
    ],
)
def test_a_target_that_matches_no_linear_is_refused(
    target: str, words: str, tmp_path: Path
) -> None:
    job = lora_job(write_checkpoint("llama", tmp_path / "m"), tmp_path, lora_target=target)
    with pytest.raises(JobError) as caught:
        Transforms(job).plan(build(job))
    assert words in str(caught.value)


def test_a_tied_head_is_refused_as_a_target(tmp_path: Path) -> None:
    folder = write_checkpoint("llama-tied", tmp_path / "m")
    job = lora_job(folder, tmp_path, lora_target="q_proj,lm_head")
    with pytest.raises(JobError, match="also the input embedding"):
        Transforms(job).plan(build(job))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2_moe"])
def test_the_base_is_frozen_bfloat16_and_the_adapters_train_in_float32(
    kind: str, tmp_path: Path
) -> None:
    job = lora_job(write_checkpoint(kind, tmp_path / "m"), tmp_path, use_dora=True)
    model = build(job)
    names = set(model.state_dict())
    Transforms(job).prepare(model)
    for name, parameter in model.named_parameters():
        of_base = plain_name(name) in names
        assert parameter.requires_grad != of_base
        assert parameter.dtype == (torch.bfloat16 if of_base else torch.float32)
        assert parameter.is_meta


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fresh_adapters_change_nothing(kind: str, form: dict[str, bool], tmp_path: Path) -> None:
    folder = write_checkpoint(kind, tmp_path / "m")
    model = adapted(lora_job(folder, tmp_path, bf16=False, **form)).eval()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, base(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_dropout_is_on_the_adapters_input_and_only_in_training(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    model = adapted(lora_job(folder, tmp_path, bf16=False, lora_dropout=0.5))
    train(model, 1)
    with torch.no_grad():
        assert not torch.equal(model(TOKENS).logits, model(TOKENS).logits)
        model.eval()
        assert torch.equal(model(TOKENS).logits, model(TOKENS).logits)


def initial_adapters(job: JobConfig) -> dict[str, torch.Tensor]:
    return adapters(adapted(job))


def test_fresh_adapters_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    job = lora_job(write_checkpoint("llama", tmp_path / "m"), tmp_path, use_dora=True)
    alone = initial_adapters(job)
    assert len(alone) == 3 * 14
    for count in (2, 3):
        for found in run_ranks(initial_adapters, count, tmp_path, job):
            assert found.keys() == alone.keys()
            assert all(torch.equal(found[name], alone[name]) for name in alone)


def all_trained_on_rank(jobs: list[tuple[JobConfig, Path]]) -> list[dict[str, Any]]:
    return [trained_on_rank(job, out) for job, out in jobs]


def trained_on_rank(job: JobConfig, out: Path) -> dict[str, Any]:
    model = adapted(job)
    losses = train(model)
    model.eval()
    with torch.no_grad():
        logits = model(TOKENS).logits
    export_model(model, job, out)
    return {"losses": losses, "logits": logits, "adapters": adapters(model)}


@pytest.fixture(scope="module")
def on_shards(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Any, ...]]:
    """Train adapters of each form on the same two ranks; return a form's checkpoint, export, and
    what the ranks found.
    """
    place = tmp_path_factory.mktemp("shards")
    folder = write_checkpoint("llama", place / "m")
    jobs = []
    for number, form in enumerate(FORMS):
        job = lora_job(folder, place / f"job{number}", gradient_checkpointing="full", **form)
        jobs.append((job, place / f"out{number}"))
    first, second = run_ranks(all_trained_on_rank, 2, place, jobs)
    return lambda number: (folder, jobs[number][1], first[number], second[number])


@pytest.mark.parametrize("form", range(len(FORMS)))
def test_adapters_trained_on_shards_load_into_peft_and_transformers(
    form: int, on_shards: Callable[[int], tuple[Any, ...]]
) -> None:
    folder, out, first, second = on_shards(form)
    assert first["losses"] == second["losses"] and first["losses"][-1] < 0.9 * first["losses"][0]
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    by_peft = PeftModel.from_pretrained(base, out).eval()
    loaded = {n: p for n, p in by_peft.named_parameters() if "lora_" in n}
    assert len(loaded) == len(first["adapters"])
    for name, value in first["adapters"].items():
        assert torch.equal(loaded[f"base_model.model.{name}"], value), name
    by_transformers = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        untouched = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(
            TOKENS
        ).logits
        for again in (by_peft, by_transformers):  # transformers fills in what it does not find
            # Training multiplies in bfloat16 throughout, PEFT's inference keeps the adapters in
            # float32.
            error = (again(TOKENS).logits.float() - first["logits"].float()).abs().max()
            assert error < 0.1 * (untouched.float() - first["logits"].float()).abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_a_float32_adapter_gives_peft_the_same_logits(
    form: dict[str, bool], tmp_path: Path
) -> None:
    folder, out = write_checkpoint("llama", tmp_path / "m"), tmp_path / "out"
    job = lora_job(folder, tmp_path, bf16=False, lora_alpha=5, **form)
    model = adapted(job)
    train(model)
    export_model(model, job, out)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    again = PeftModel.from_pretrained(base, out).eval()
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, again(TOKENS).logits)


def test_the_adapters_config_names_the_base_and_the_modules(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    job = lora_job(folder, tmp_path, lora_target="q_proj,v_proj")
    export_model(adapted(job), job, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
    assert config["inference_mode"] is True


@pytest.mark.parametrize(
    ("form", "kept"), [({}, "none"), ({}, "full"), ({"use_dora": True}, "full")]
)
def test_compiled_layers_with_adapters_train_the_same(
    form: dict[str, Any], kept: str, tmp_path: Path
) -> None:
    form = {**form, "gradient_checkpointing": kept}
    form["lora_target"] = "q_proj,v_proj"
    folder = write_checkpoint("llama", tmp_path / "m", num_hidden_layers=1)
    eager = train(adapted(lora_job(folder, tmp_path, bf16=False, **form)))
    model = adapted(lora_job(folder, tmp_path, bf16=False, **form))
    one_graph = "use_dora" not in form
    for layer in model.model.layers:
        layer.compile(fullgraph=one_graph, backend="aot_eager")
    torch.testing.assert_close(train(model), eager, rtol=1e-4, atol=1e-5)


def test_lora_needs_no_particular_machine() -> None:
    Lora().check(HardwareFacts.__new__(HardwareFacts))
