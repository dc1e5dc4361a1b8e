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
    """Within 0.5 %; int8's first loss to the bit, as its forward pass is not in FP8."""
    int8 = {"qat_weight_dtype": "int8"}
    figures = run_workers(
        2,
        job("qat", **QAT, **EVALUATED),
        job("both", **BOTH, **EVALUATED),
        job("qat8", **{**QAT, **int8}),
        job("both8", **{**BOTH, **int8}),
    )
    for plain, both in (("qat", "both"), ("qat8", "both8")):
        expected, found = losses(tmp_path / plain), losses(tmp_path / both)
        assert found != expected
        assert list(found.values()) == pytest.approx(list(expected.values()), rel=5e-3)
    assert losses(tmp_path / "qat8")[1] == losses(tmp_path / "both8")[1]
    assert losses(tmp_path / "qat")[1] != losses(tmp_path / "both")[1]
    expected, found = eval_losses(tmp_path / "qat"), eval_losses(tmp_path / "both")
    assert found == pytest.approx(expected, rel=5e-3)
    assert [f["quantized_logit_difference"] for f in figures] == [0.0] * 4


def test_rounding_begins_with_step_n_and_before_it_the_run_is_fp8s(job, tmp_path):
    """And one resumed in between, on one worker less, is the same run."""
    delayed = {**BOTH, "fake_quant_after_n_steps": 3}
    saved = {"save_strategy": "steps", "save_steps": 2}
    run_workers(2, job("fp8", **FP8), job("delayed", **delayed), job("part", **delayed, **saved))
    expected, found = losses(tmp_path / "fp8"), losses(tmp_path / "delayed")
    assert [step for step in expected if expected[step] == found[step]] == [1, 2, 3]
    assert losses(tmp_path / "part") == found
    kill_last_checkpoint(tmp_path / "part")
    again = {**delayed, **saved, "resume_from_checkpoint": True, "gradient_accumulation_steps": 2}
    assert run_workers(1, job("again", "part", **again))[0]["resumed_from_step"] == 4
    assert list(losses(tmp_path / "part").values()) == pytest.approx(list(found.values()), rel=2e-3)


def test_compiled_and_recomputed_layers_train_alike(job, tmp_path):
    recomputed = {"disable_gradient_checkpointing": False}
    compiled = {"torch_compile": True, **recomputed, "max_steps": 2}
    run_workers(1, job("eager", **BOTH), job("full", **BOTH, **recomputed))
    run_workers(1, job("compiled", **BOTH, **compiled))
    assert losses(tmp_path / "full") == losses(tmp_path / "eager")
    found = losses(tmp_path / "compiled")
    assert [found[1]] == pytest.approx([losses(tmp_path / "eager")[1]], rel=2e-3)
