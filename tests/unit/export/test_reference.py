"""An engine's answers are compared with training's: the same agree, another model's do not."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from raytrain_adv.cli import main
from raytrain_adv.driver.commands.verify import run
from raytrain_adv.errors import JobError, StorageError, TrainingError
from raytrain_adv.export.reference import (
    REFERENCE,
    agreement,
    read_reference,
    sample_tokens,
    write_reference,
)
from raytrain_adv.export.verify import compared_tokens, most_divergence
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


@pytest.mark.parametrize("damage", ["scale", "cut", "gone"])
def test_files_that_changed_since_the_export_are_named(damage: str, tmp_path: Path) -> None:
    file = folder(tmp_path, 1.0) / "model.safetensors"
    stored = bytearray(file.read_bytes())
    stored[-7] ^= 1  # one bit, which no divergence shows
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(stored if damage == "scale" else stored[:-9])
    with pytest.raises(StorageError, match="not as it was exported") as error:
        run(file.parent, "transformers", "")
    expected = "model.safetensors is gone" if damage == "gone" else "model.safetensors has changed"
    assert error.value.found == expected
    (file.parent / REFERENCE).write_bytes(b"PK")
    with pytest.raises(JobError, match="is damaged"):
        run(file.parent, "transformers", "")


def test_an_engine_that_fails_is_not_called_missing(tmp_path: Path) -> None:
    place = folder(tmp_path, 1.0)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'RuntimeError: no such operator' >&2; exit 1\n")
    python.chmod(0o755)
    with pytest.raises(JobError, match="vllm did not answer") as error:
        run(place, "vllm", str(python))
    assert "--python" not in error.value.fix and "no such operator" in error.value.found


@pytest.mark.parametrize(
    ("stored", "engine", "named"),
    [
        ("gguf", "transformers", "--engine llamacpp;"),
        ("compressed-tensors", "executorch", "--engine vllm or transformers;"),
        ("torchao", "llamacpp", "--engine transformers or vllm or executorch;"),
    ],
)
def test_a_format_that_the_engine_does_not_read_is_named(
    stored: str, engine: str, named: str, tmp_path: Path
) -> None:
    """The engine was started, and its traceback printed."""
    place = folder(tmp_path, 1.0)
    if stored == "gguf":
        (place / "model.gguf").touch()
    else:
        config = json.loads((place / "config.json").read_text())
        config["quantization_config"] = {"quant_method": stored}
        (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(JobError, match=f"{engine} does not read") as error:
        run(place, engine, "")
    assert named in error.value.fix


def test_an_engine_s_error_before_its_progress_bars_and_its_exit_status_are_shown(
    tmp_path: Path,
) -> None:
    place, python = folder(tmp_path, 1.0), tmp_path / "python"
    bars = "Loading: 0% |          | 0/2 " * 100
    python.write_text(
        f"#!/bin/sh\necho 'ValueError: no base_model' >&2; echo '{bars}' >&2; kill -9 $$\n"
    )
    python.chmod(0o755)
    with pytest.raises(JobError) as error:
        run(place, "vllm", str(python))
    assert error.value.found.startswith("ValueError: no base_model\n")
    assert error.value.found.endswith("exit status -9")


def test_tokens_that_one_side_does_not_list_count(tmp_path: Path) -> None:
    known = read_reference(folder(tmp_path, 1.0))
    ids, values = known["ids"].tolist(), known["logprobs"].tolist()
    right = [dict(zip(*one, strict=True)) for one in zip(ids, values, strict=True)]
    assert agreement(known, right).kl < 1e-6
    others = {1000 + n: -9.0 for n in range(63)}
    one_shared = [{i[-1]: -1.0, **others} for i in ids]
    assert agreement(known, one_shared).kl > 1.0
    assert agreement(known, []).kl == float("inf")


def test_rounded_activations_alone_may_differ_more(tmp_path: Path) -> None:
    def most(stored: object) -> float:
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": stored}))
        return most_divergence(tmp_path)

    for inputs, allowed in ((None, 0.05), ({"num_bits": 8}, 0.2)):
        groups = {"group_0": {"input_activations": inputs}}
        assert most({"quant_method": "compressed-tensors", "config_groups": groups}) == allowed
    assert most(None) == 0.05 and most({"quant_method": "torchao"}) == 0.2


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
