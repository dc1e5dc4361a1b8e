"""Multimodal checkpoints on text: their own class; towers stay in the checkpoint."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from raytrain_adv.errors import JobError
from raytrain_adv.export.model_folder import export_model
from raytrain_adv.model.build import build
from raytrain_adv.model.notes import model_notes
from raytrain_adv.model.weights import load_pretrained, materialize
from raytrain_adv.ops.absent import absent_modules
from tests.multimodal_families import tiny_multimodal
from tests.multimodal_models import FAMILIES, write_multimodal
from tests.tiny_models import job_for

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 27).reshape(2, 12)


@pytest.mark.parametrize("kind", FAMILIES)
def test_text_computes_as_transformers_and_an_export_is_the_checkpoint(
    kind: str, tmp_path: Path
) -> None:
    folder, out = write_multimodal(kind, tmp_path / "model"), tmp_path / "out"
    job = job_for(folder, tmp_path / "job", finetuning_type="full", pure_bf16=True)
    model = build(job)
    assert not any("vis" in name for name, _ in model.named_parameters())
    (note,) = model_notes(job, model)
    assert "not loaded" in note and all(fqn in note for fqn, _ in absent_modules(model))
    materialize(model, CPU)
    load_pretrained(model, job, CPU)
    whole = getattr(transformers, FAMILIES[kind][0]).from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        ours, theirs = (m.eval()(input_ids=TOKENS, use_cache=False).logits for m in (model, whole))
    assert torch.equal(ours, theirs)
    export_model(model, job, out)
    before, after = (load_file(f / "model.safetensors") for f in (folder, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8)) for n in before)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [FAMILIES[kind][0]] and config["model_type"] == kind
    assert (out / "preprocessor_config.json").is_file()


def test_a_missing_tensor_of_a_tower_stops_the_run(tmp_path: Path) -> None:
    folder = write_multimodal("gemma3", tmp_path / "model")
    held = load_file(folder / "model.safetensors")
    name = next(name for name in held if "vision" in name)
    del held[name]
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    job = job_for(folder, tmp_path / "job", bf16=True)
    model = build(job)
    materialize(model, CPU)
    with pytest.raises(JobError, match="1 missing"):
        load_pretrained(model, job, CPU)


def test_a_model_of_text_that_it_denoises_is_refused(tmp_path: Path) -> None:
    tiny_multimodal("diffusion_gemma").save_pretrained(tmp_path / "model")
    with pytest.raises(JobError, match="cannot be trained on text alone") as refusal:
        build(job_for(tmp_path / "model", tmp_path / "job"))
    assert "decoder_input_ids" in refusal.value.found


def test_a_model_that_wants_the_kind_of_each_token_is_told_that_it_is_text(tmp_path: Path) -> None:
    tiny_multimodal("molmo2").save_pretrained(tmp_path / "model")
    job = job_for(tmp_path / "model", tmp_path / "job")
    model = build(job)
    materialize(model, CPU)
    load_pretrained(model, job, CPU)
    with torch.no_grad():
        alone, trained = (model.train(m)(input_ids=TOKENS).logits for m in (False, True))
    assert torch.equal(alone, trained)
