"""FP8 and QAT together, through the line on CPU processes."""

import json

import pytest

from tests.integration.test_line_without_ray import kill_last_checkpoint
from tests.workers import losses, run_workers

QAT = {
    "enable_qat": True,
    "qat_weight_dtype": "int4",
    "qat_activation_dtype": "int8",
    "qat_group_size": 32,
}
FP8 = {"fp8": True, "fp8_allow_cpu": True, "fp8_min_features": 16}
BOTH = {**FP8, **QAT}
EVALUATED = {"val_size": 8, "eval_strategy": "steps", "eval_steps": 3}


def eval_losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["kind"] == "eval"]


@pytest.fixture
def job(job_file, tmp_path):
    def write(name, folder="", **keys):
        keys = {"learning_rate": 2.0e-3, **keys}
        return job_file(f"{name}.yaml", output_dir=str(tmp_path / (folder or name)), **keys)

    return write


def test_losses_are_those_of_qat_and_the_exported_model_is_the_evaluated_one(job, tmp_path):
    """Within 0.5 %, on adapters too; int8's first loss to the bit: its forward passes are not in
    FP8.
    """
    unsaved = {"export_model": False}
    int8 = {"qat_weight_dtype": "int8", "max_steps": 2, **unsaved}
    figures = run_workers(
        2,
        job("both", **BOTH, **EVALUATED),
        job("qat", **QAT, **EVALUATED, **unsaved),
        job("full", **BOTH, **EVALUATED, **unsaved, disable_gradient_checkpointing=False),
        job("qat8", **{**QAT, **int8}),
        job("both8", **{**BOTH, **int8}),
    )
    assert figures[0]["quantized_logit_difference"] == 0.0
    adapters = {
        **unsaved,
        "model_name_or_path": figures[0]["model_dir"],
        "train_from_scratch": False,
        "finetuning_type": "lora",
        "lora_rank": 16,
    }
    run_workers(2, job("qat-lora", **QAT, **adapters), job("both-lora", **BOTH, **adapters))
    for plain, both in (("qat", "both"), ("qat8", "both8"), ("qat-lora", "both-lora")):
        expected, found = losses(tmp_path / plain), losses(tmp_path / both)
        assert found != expected
        assert list(found.values()) == pytest.approx(list(expected.values()), rel=5e-3)
    assert losses(tmp_path / "full") == losses(tmp_path / "both")
    assert losses(tmp_path / "qat8")[1] == losses(tmp_path / "both8")[1]
    assert losses(tmp_path / "qat")[1] != losses(tmp_path / "both")[1]
    expected, found = eval_losses(tmp_path / "qat"), eval_losses(tmp_path / "both")
    assert found == pytest.approx(expected, rel=5e-3)


def test_rounding_begins_with_step_n_and_before_it_the_run_is_fp8s(job, tmp_path):
    """And one resumed in between, on one worker less, is the same run."""
    delayed = {**BOTH, "fake_quant_after_n_steps": 3, "export_model": False}
    saved = {"save_strategy": "steps", "save_steps": 2}
    run_workers(
        2,
        job("fp8", **FP8, export_model=False),
        job("delayed", **delayed),
        job("part", **delayed, **saved),
    )
    expected, found = losses(tmp_path / "fp8"), losses(tmp_path / "delayed")
    assert [step for step in expected if expected[step] == found[step]] == [1, 2, 3]
    assert losses(tmp_path / "part") == found
    kill_last_checkpoint(tmp_path / "part")
    again = {**delayed, **saved, "resume_from_checkpoint": True, "gradient_accumulation_steps": 2}
    assert run_workers(1, job("again", "part", **again))[0]["resumed_from_step"] == 4
    assert list(losses(tmp_path / "part").values()) == pytest.approx(list(found.values()), rel=2e-3)
