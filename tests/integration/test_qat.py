"""QAT through the line on CPU processes: the delay, resuming, evaluation, sharding, adapters."""

import json

import pytest
import torch
import yaml
from torch._dynamo.testing import CompileCounter

from raytrain_adv.config import load
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.qat import rounding
from tests.integration.test_line_without_ray import kill_last_checkpoint
from tests.workers import events, losses, run_workers

QAT = {
    "enable_qat": True,
    "qat_weight_dtype": "int4",
    "qat_activation_dtype": "int8",
    "qat_group_size": 32,
    "bf16": True,
}
DELAYED = {**QAT, "fake_quant_after_n_steps": 3}
EVALUATED = {"val_size": 8, "eval_strategy": "steps", "eval_steps": 2}


def test_rounding_begins_with_step_n_by_its_numbers(job_file, tmp_path):
    """Losses before it are the plain run's, to the bit; from it on they are not; with 0 they never
    are.
    """

    def job(name, **keys):
        return job_file(f"{name}.yaml", output_dir=str(tmp_path / name), **keys)

    plain = {"bf16": True}
    run_workers(2, job("plain", **plain), job("delayed", **DELAYED), job("now", **QAT))
    expected, found = losses(tmp_path / "plain"), losses(tmp_path / "delayed")
    assert [step for step in expected if expected[step] == found[step]] == [1, 2, 3]
    assert losses(tmp_path / "now")[1] != expected[1]
    for name, first in (("delayed", 4), ("now", 1)):
        (said,) = events(tmp_path / name, "switch")
        assert said["message"] == f"QAT is on from step {first}"
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=2e-2)


@pytest.mark.parametrize("saved_at", [2, 3, 4])
def test_a_run_resumed_before_at_and_after_n_is_the_uninterrupted_run(job_file, tmp_path, saved_at):
    whole, part = tmp_path / "whole", tmp_path / "part"
    keys = {**DELAYED, "save_strategy": "steps", "save_steps": saved_at}
    run_workers(
        1,
        job_file("whole.yaml", output_dir=str(whole), **DELAYED),
        job_file("part.yaml", output_dir=str(part), **keys),
    )
    for checkpoint in sorted((part / "checkpoints" / "local").iterdir())[1:]:
        (checkpoint / "manifest.json").unlink()
    again = job_file("again.yaml", output_dir=str(part), resume_from_checkpoint=True, **keys)
    assert run_workers(1, again)[0]["resumed_from_step"] == saved_at
    assert losses(part) == losses(whole)


def test_evaluation_is_always_with_rounding_and_the_switch_is_measured(job_file, tmp_path):
    out = tmp_path / "out"
    run_workers(1, job_file("job.yaml", output_dir=str(out), **DELAYED, **EVALUATED))
    found = {(row["variant"], row["step"]): row["loss"] for row in events(out, "variant")}
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    evaluated = {row["step"]: row["loss"] for row in rows if row["kind"] == "eval"}
    assert set(found) == {
        ("bf16", 3),
        ("PTQ", 3),
        ("QAT", 6),
        ("QAT's weights, not quantized", 6),
    }
    assert found["QAT", 6] == evaluated[6] != found["QAT's weights, not quantized", 6]
    assert found["PTQ", 3] != found["bf16", 3]


def test_a_twin_is_measured_by_its_own_weights_and_their_ptq(job_file, tmp_path):
    """As the driver runs them with compare: true, also where the run itself exports nothing."""
    out = tmp_path / "out"
    keys = {**DELAYED, **EVALUATED, "bf16": False, "output_dir": str(out)}
    job = job_file("job.yaml", **keys, compare=True, export_model=False)
    (twin,) = Transforms(load(job)).twins()
    own = {k: v for k, v in twin.given().items() if k != "resume_from_checkpoint"}
    twin_file = tmp_path / "twin.yaml"
    twin_file.write_text(yaml.safe_dump(own))
    run_workers(1, twin_file, job)
    found = {row["variant"]: row["loss"] for row in events(out, "variant")}
    rows = map(json.loads, (tmp_path / "out-bf16" / "metrics.jsonl").read_text().splitlines())
    assert found["bf16 twin"] == [row["loss"] for row in rows if row["kind"] == "eval"][-1]
    assert found["PTQ of the twin"] != found["bf16 twin"]


def test_never_trains_in_bf16_and_evaluates_ptq(job_file, tmp_path):
    def job(name, **keys):
        return job_file(f"{name}.yaml", output_dir=str(tmp_path / name), **keys, **EVALUATED)

    never = {**QAT, "fake_quant_after_n_steps": "never"}
    run_workers(1, job("plain", bf16=True), job("never", **never))
    assert losses(tmp_path / "never") == losses(tmp_path / "plain")
    found = {row["variant"] for row in events(tmp_path / "never", "variant")}
    assert found == {"bf16", "PTQ"}


def test_sharding_and_checkpointing_change_little(job_file, tmp_path):
    def job(name, **keys):
        return job_file(f"{name}.yaml", output_dir=str(tmp_path / name), **{**QAT, **keys})

    run_workers(1, job("one", gradient_accumulation_steps=2))
    run_workers(2, job("two"), job("full", disable_gradient_checkpointing=False))
    expected = list(losses(tmp_path / "one").values())
    assert losses(tmp_path / "full") == losses(tmp_path / "two")
    assert list(losses(tmp_path / "two").values()) == pytest.approx(expected, rel=5e-3)


@pytest.mark.slow  # minutes of compilation
def test_compiling_with_checkpointing_changes_little(job_file, tmp_path):
    keys = {**QAT, "gradient_accumulation_steps": 2}
    compiled = {"torch_compile": True, "disable_gradient_checkpointing": False}
    run_workers(
        1,
        job_file("one.yaml", output_dir=str(tmp_path / "one"), **keys),
        job_file("compiled.yaml", output_dir=str(tmp_path / "compiled"), **keys, **compiled),
    )
    found, expected = (list(losses(tmp_path / name).values()) for name in ("compiled", "one"))
    assert found == pytest.approx(expected, rel=5e-3)


def test_adapters_train_on_a_rounded_base(job_file, tmp_path):
    base = tmp_path / "base"
    run_workers(1, job_file("base.yaml", output_dir=str(base), bf16=True))
    lora = {
        "model_name_or_path": str(base / "model"),
        "train_from_scratch": False,
        "finetuning_type": "lora",
        "lora_rank": 4,
    }

    def job(name, **keys):
        return job_file(f"{name}.yaml", output_dir=str(tmp_path / name), **lora, **keys)

    merged = {**DELAYED, "qat_activation_dtype": "none", "qat_lora": "merge_aware"}
    distilled = {**QAT, "qat_weight_dtype": "int2", "use_distill_loss": True}
    *_, written = run_workers(
        2,
        job("plain", bf16=True),
        job("qat", **DELAYED),
        job("distilled", **distilled),
        job("merged", **merged),
    )
    plain, found = losses(tmp_path / "plain"), losses(tmp_path / "qat")
    assert [step for step in plain if plain[step] == found[step]] == [1, 2, 3]
    assert 0 < losses(tmp_path / "distilled")[1] < 0.5 * plain[1]  # nats from the teacher
    assert written["quantized_logit_difference"] == 0
    assert not (tmp_path / "merged" / "model-quantized" / "adapter_config.json").exists()
    one = tmp_path / "merged" / "model-merged"
    assert (one / "tokenizer_config.json").exists() and (one / "model.safetensors").exists()


def test_the_same_checkpoint_goes_on_in_bf16_and_in_qat(job_file, tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 3}
    run_workers(2, job_file("a.yaml", output_dir=str(tmp_path / "a"), **QAT, **saved))
    kill_last_checkpoint(tmp_path / "a")
    named = {
        "resume_from_checkpoint": str(tmp_path / "a" / "checkpoints" / "local" / "step_00000003"),
        "output_dir": str(tmp_path / "b"),
        "bf16": True,
    }
    assert run_workers(2, job_file("b.yaml", **named))[0]["resumed_from_step"] == 3


def test_switching_costs_one_more_graph(make_job):
    """A layer is compiled for each state it is in, and not again when it comes back to it."""
    from raytrain_adv.model import parallel, weights
    from raytrain_adv.model.build import build
    from raytrain_adv.transforms.applied import Transforms
    from raytrain_adv.transforms.qat import Qat

    torch._dynamo.reset()
    counter = CompileCounter()
    job = make_job(**QAT, torch_compile=False)
    model = build(job)
    Transforms(job).prepare(model)
    parallel.shard(model, job, None)
    weights.materialize(model, torch.device("cpu"))
    weights.init_from_scratch(model, job, torch.device("cpu"))
    for layer in model.model.layers:
        layer.compile(backend=counter)
    ids = torch.arange(16).view(1, 16)
    counts = []
    for on in (False, False, True, True, False, True):
        job.transform(Qat).switch(model, on)
        assert {m.rounds for m in rounding(model)} == {on}
        model(input_ids=ids, use_cache=False).logits.sum().backward()
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 2 + [2 * counts[0]] * 4


def test_an_fp8_checkpoint_goes_on_in_qat(job_file, tmp_path):
    fp8 = {"fp8": True, "fp8_allow_cpu": True, "fp8_min_features": 16, "bf16": True}
    gathered = {**fp8, "fp8_enable_fsdp_float8_all_gather": True}
    saved = {"save_strategy": "steps", "save_steps": 3}
    run_workers(2, job_file("a.yaml", output_dir=str(tmp_path / "a"), **gathered, **saved))
    named = {
        "resume_from_checkpoint": str(tmp_path / "a" / "checkpoints" / "local" / "step_00000003"),
        "output_dir": str(tmp_path / "b"),
    }
    assert run_workers(2, job_file("b.yaml", **named, **QAT))[0]["resumed_from_step"] == 3
    assert set(losses(tmp_path / "b")) == {4, 5, 6}
