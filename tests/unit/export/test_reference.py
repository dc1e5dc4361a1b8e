"""An engine's answers are compared with training's: the same agree, another model's do not."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from raytrain_adv.cli import main
from raytrain_adv.driver.commands.verify import run
from raytrain_adv.errors import JobError, TrainingError
from raytrain_adv.export.reference import sample_tokens, write_reference
from raytrain_adv.export.verify import compared_tokens
from raytrain_adv.model.build import build
from raytrain_adv.model.vocabulary import read_tokenizer
from tests.conftest import tiny_keys
from tests.families import tiny_model
from tests.tiny_models import job_for, write_checkpoint

TOKENS = torch.arange(40).unsqueeze(0)


def folder(tmp_path: Path, scale: float) -> Path:
    place = write_checkpoint("llama", tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(place, dtype="auto").eval()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= scale
        model.lm_head.weight *= 30
        logits = model(input_ids=TOKENS).logits
        model.model.layers[1].mlp.down_proj.weight /= scale
        model.save_pretrained(place)
    write_reference(place, TOKENS, logits)
    return place


def test_the_same_model_agrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = folder(tmp_path, 1.0)
    assert main(["verify", str(place), "--engine", "transformers", "--python", sys.executable]) == 0
    printed = capsys.readouterr().out
    assert "39 positions: the same most likely token in 100.0%" in printed
    assert "transformers 5." in printed and "tokens/s" in printed


def test_a_run_stands_for_its_model_and_no_folder_is_named_as_such(tmp_path: Path) -> None:
    """Both were refused as exports that had not been compared."""
    folder(tmp_path, 1.0).rename(tmp_path / "model")
    (tmp_path / "run.json").write_text("{}")
    assert main(["verify", str(tmp_path), "--engine", "transformers"]) == 0
    with pytest.raises(JobError, match="there is no folder"):
        run(tmp_path / "models", "transformers", "")


def test_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="computes another model"):
        run(folder(tmp_path, 16.0), "transformers", "")


def test_a_folder_without_answers_and_a_missing_engine_are_named(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="not compared"):
        run(write_checkpoint("llama", tmp_path / "other"), "vllm", "")
    with pytest.raises(JobError) as error:
        run(folder(tmp_path, 1.0), "vllm", "")
    assert "--python" in error.value.fix and "No module named 'vllm'" in error.value.found
    with pytest.raises(JobError, match="does not start"):
        run(tmp_path / "m", "vllm", str(tmp_path / "no-python"))


def test_a_model_with_a_tokenizer_is_compared_on_text(tmp_path: Path) -> None:
    keys = tiny_keys(tmp_path)
    job = job_for(Path(keys["model_name_or_path"]), tmp_path / "job", train_from_scratch=True)
    tokens = sample_tokens(build(job), job, 20)
    assert read_tokenizer(job).decode(tokens).startswith("Rivers begin as rain.")
    bare = job_for(write_checkpoint("llama", tmp_path / "bare"), tmp_path / "other")
    assert len(sample_tokens(build(bare), bare, 20)) == 20


def test_compared_text_fits_positions_that_begin_behind_padding():
    model = tiny_model("roberta")
    tokens = compared_tokens(model, torch.arange(256))
    assert tokens.shape == (1, 256 - 1 - model.config.pad_token_id)
    model(input_ids=tokens)
