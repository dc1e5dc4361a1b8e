"""An engine's answers are compared with training's: the same agree, another model's do not."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from raytrain_adv.cli import main
from raytrain_adv.driver.commands.verify import run
from raytrain_adv.errors import JobError, TrainingError
from raytrain_adv.export.reference import write_reference
from tests.tiny_models import write_checkpoint

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
    assert "39 positions: the same most likely token in 100.0%" in capsys.readouterr().out


def test_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="computes another model"):
        run(folder(tmp_path, 16.0), "transformers", "")


def test_a_folder_without_answers_and_a_missing_engine_are_named(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="not compared"):
        run(tmp_path, "vllm", "")
    with pytest.raises(JobError) as error:
        run(folder(tmp_path, 1.0), "vllm", "")
    assert "--python" in error.value.fix and "No module named 'vllm'" in error.value.found
