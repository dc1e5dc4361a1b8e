"""Checkpoints whose weights are rounded train, and are exported as plain folders."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    GptOssForCausalLM,
    Mxfp4Config,
)

from raytrain_adv import hardware
from raytrain_adv.config import JobConfig
from raytrain_adv.dtensor import gather
from raytrain_adv.export.model_folder import export_model
from raytrain_adv.model import parallel
from raytrain_adv.model.build import build
from raytrain_adv.model.notes import model_notes
from raytrain_adv.model.weights import (
    load_pretrained,
    materialize,
    packed_weights,
    saved_tensors,
)
from raytrain_adv.transforms.applied import Transforms
from tests import stored_models
from tests.ranks import run_ranks
from tests.tiny_models import job_for, write_checkpoint

CPU = torch.device("cpu")
ABOUT = {"quant_method": "fp8", "weight_block_size": [8, 8], "activation_scheme": "dynamic"}


def gpt_oss(folder: Path) -> Path:
    """Write a gpt-oss checkpoint whose experts are in MXFP4, with the names it is published by."""
    config = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=90,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    model = GptOssForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    held = load_file(folder / "model.safetensors")
    for name in [name for name in held if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = held.pop(name).shape
        shape = (experts, rows, columns // 32)
        held[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        held[f"{name}_scales"] = torch.randint(118, 122, shape, dtype=torch.uint8)
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def loaded_on_ranks(jobs: dict[str, JobConfig], out: Path) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for kind, job in jobs.items():
        model = build(job)
        parallel.shard(model, job, parallel.build_mesh(job, CPU))
        materialize(model, CPU)
        load_pretrained(model, job, CPU)
        found[kind] = {name: gather(t).clone() for name, t in saved_tensors(model).items()}
        export_model(model, job, out / kind)
    return found


def test_ranks_read_rounded_weights_as_transformers_does_and_export_them_plain(
    tmp_path: Path,
) -> None:
    folders = {
        kind: stored_models.rewrite(
            write_checkpoint(kind, tmp_path / kind), ABOUT, stored_models.float8(8)
        )
        for kind in ("llama", "qwen3_moe")
    } | {"gpt_oss": gpt_oss(tmp_path / "gpt_oss")}
    jobs = {k: job_for(f, tmp_path / f"job-{k}", bf16=True) for k, f in folders.items()}
    states, _ = run_ranks(loaded_on_ranks, 2, tmp_path, jobs, tmp_path / "out")
    for kind, folder in folders.items():
        fp8 = FineGrainedFP8Config(dequantize=True, weight_block_size=(8, 8))
        how = Mxfp4Config(dequantize=True) if kind == "gpt_oss" else fp8
        theirs = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=how, dtype=torch.bfloat16
        ).state_dict()
        ours = states[kind]
        assert ours.keys() == theirs.keys(), kind
        assert all(torch.equal(ours[n].bfloat16(), theirs[n]) for n in ours), kind
        out = tmp_path / "out" / kind
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
        again = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
        assert all(torch.equal(again[name], theirs[name]) for name in theirs), kind


BLOCKS = {"hidden_size": 256, "intermediate_size": 384}


def kept_on_ranks(job: JobConfig) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    model = build(job)
    plans = Transforms(job).prepare(model, hardware.detect(CPU))
    parallel.shard(model, job, parallel.build_mesh(job, CPU))
    materialize(model, CPU)
    load_pretrained(model, job, CPU)
    notes = Transforms(job).initialize(model, plans, 0)["qlora"].notes
    return {name: layer.unpacked() for name, layer in packed_weights(model).items()}, notes


def test_weights_in_blocks_of_float8_are_kept_as_they_are_stored(tmp_path: Path) -> None:
    """On any number of ranks. Rounding them again, with scales of their own, would change them."""
    folder = write_checkpoint("llama", tmp_path / "model", **BLOCKS)
    about = {**ABOUT, "weight_block_size": [128, 128]}
    stored_models.rewrite(folder, about, stored_models.float8(128))
    how = FineGrainedFP8Config(dequantize=True, weight_block_size=(128, 128))
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=how, dtype=torch.bfloat16
    ).state_dict()
    keys = {"finetuning_type": "lora", "quantization_bit": 8, "quantization_type": "fp8_blocks"}
    job = job_for(folder, tmp_path / "job", bf16=True, **keys)
    for held, notes in [kept_on_ranks(job), *run_ranks(kept_on_ranks, 3, tmp_path, job)]:
        assert len(held) == 14
        assert all(torch.equal(held[name], theirs[name]) for name in held)
        assert any("quantized weights are 0.00% from the originals" in note for note in notes)


def test_the_plan_tells_that_weights_are_read_as_their_values(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "model")
    job = job_for(folder, tmp_path)
    assert model_notes(job, build(job)) == ()
    stored_models.rewrite(folder, ABOUT, stored_models.float8(8))
    (note,) = model_notes(job, build(job))
    assert "quantized weights (fp8)" in note
