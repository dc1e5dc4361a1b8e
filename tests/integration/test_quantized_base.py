"""QLoRA through the line on two CPU processes: what it trains on, resuming, evaluation, merging."""

import json
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raytrain_adv.cli import main
from raytrain_adv.config import load
from tests.integration.test_line_without_ray import kill_last_checkpoint
from tests.noted import note_done
from tests.workers import losses, run_workers

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
QUANTIZED = {"quantization_bit": 4, "quantization_type": "nf4"}


@pytest.fixture
def base(keys, job_file, tmp_path):
    """Return a trained model folder, whose linears fill whole blocks."""
    config = Path(keys["model_name_or_path"]) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | SIZES))
    out = tmp_path / "base"
    run_workers(2, job_file("base.yaml", output_dir=str(out), max_steps=4))
    return out / "model"


def dequantized(folder, out):
    """Write a model whose linears have the values that bitsandbytes' quantized ones stand for."""
    out.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        if "_proj" in name:
            held, state = bnb.functional.quantize_4bit(
                weight, compress_statistics=True, quant_type="nf4"
            )
            tensors[name] = bnb.functional.dequantize_4bit(held, state)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def held_out(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["kind"] == "eval"]


def test_qlora_is_lora_on_the_dequantized_base_and_resumes_and_merges(
    base, job_file, tmp_path, capsys
):
    lora = {
        "train_from_scratch": False,
        "finetuning_type": "lora",
        "lora_dropout": 0.1,
        "per_device_train_batch_size": 8,
        "val_size": 8,
        "eval_strategy": "steps",
        "eval_steps": 3,
    }
    saved = {"save_strategy": "steps", "save_steps": 3}

    def job(name, model=base, out=None, **changed):
        folders = {"model_name_or_path": str(model), "output_dir": str(tmp_path / (out or name))}
        return job_file(f"{name}.yaml", **{**lora, **folders, **changed})

    whole = dequantized(base, tmp_path / "dequantized")
    quantized = job("qlora", **QUANTIZED, **saved)
    int8 = job("int8", quantization_bit=8, max_steps=2)
    run_workers(2, quantized, job("plain", whole), int8)
    found = losses(tmp_path / "qlora")
    assert found == losses(tmp_path / "plain")
    assert held_out(tmp_path / "qlora") == held_out(tmp_path / "plain")
    assert found[6] < found[1]
    assert losses(tmp_path / "int8") != found
    adapter = load_file(tmp_path / "qlora" / "model" / "adapter_model.safetensors")
    assert all("lora_" in name for name in adapter)

    kill_last_checkpoint(tmp_path / "qlora")
    again = job("again", out="qlora", **QUANTIZED, **saved, resume_from_checkpoint=True)
    (resumed,) = run_workers(2, again)
    assert resumed["resumed_from_step"] == 3
    assert losses(tmp_path / "qlora") == found

    merges(quantized, whole, tmp_path, capsys)


def test_a_base_in_float8_trains_as_fp8_does_and_resumes_and_merges(
    base, job_file, tmp_path, capsys
):
    """Losses, on two ranks, are those of FP8 training with the same frozen weights in bf16."""
    lora = {
        "model_name_or_path": str(base),
        "train_from_scratch": False,
        "finetuning_type": "lora",
        "per_device_train_batch_size": 8,
    }
    saved = {"save_strategy": "steps", "save_steps": 3}
    stored = {"quantization_bit": 8, "quantization_type": "fp8", "quantization_allow_cpu": True}
    by_values = {**stored, "quantization_products": "dequantized"}
    del by_values["quantization_allow_cpu"]

    def job(name, out=None, **keys):
        return job_file(f"{name}.yaml", output_dir=str(tmp_path / (out or name)), **lora, **keys)

    fp8 = job("fp8", fp8=True, fp8_allow_cpu=True, fp8_min_features=0)
    held = job("held", **stored, **saved)
    run_workers(2, held, fp8, job("values", max_steps=2, **by_values))
    found = losses(tmp_path / "held")
    assert found == losses(tmp_path / "fp8")
    assert found[6] < found[1]
    assert losses(tmp_path / "values")[1] != found[1]

    kill_last_checkpoint(tmp_path / "held")
    again = job("again", "held", **stored, **saved, resume_from_checkpoint=True)
    (resumed,) = run_workers(2, again)
    assert resumed["resumed_from_step"] == 3
    assert losses(tmp_path / "held") == found

    note_done(load(held))
    out = tmp_path / "merged"
    capsys.readouterr()
    assert main(["export", str(tmp_path / "held"), "--merge", "--output", str(out)]) == 0
    said = capsys.readouterr().out
    assert "float8_e4m3fn with a scale per matrix" in said
    assert "merged into the weights as they were before, they would differ by" in said
    assert "the likeliest token is the same at 100.0 % of them" in said
    merged = load_file(out / "model" / "model.safetensors")
    adapter = load_file(tmp_path / "held" / "model" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    weight = load_file(base / "model.safetensors")[f"{name}.weight"]
    multiplier = (448 / weight.abs().max().double()).float()
    rounded = (weight * multiplier).to(torch.float8_e4m3fn).float() * multiplier.reciprocal()
    torch.testing.assert_close(merged[f"{name}.weight"], rounded + 2.0 * b @ a, rtol=0, atol=1e-6)


def merges(job_path, whole, tmp_path, capsys):
    """The merged model is the dequantized base with the adapter, and the command says so."""
    job, out = load(job_path), tmp_path / "merged"
    run = Path(job.output.output_dir)
    note_done(job)
    assert main(["export", str(run), "--merge", "--output", str(out)]) == 0
    said = capsys.readouterr().out
    assert "nf4 in blocks of 64, scales quantized too" in said
    assert "merged into the weights as they were before, they would differ by" in said
    merged, tensors = (
        load_file(out / "model" / "model.safetensors"),
        load_file(whole / "model.safetensors"),
    )
    adapter = load_file(run / "model" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    expected = tensors[f"{name}.weight"] + 2.0 * b @ a  # alpha is twice the rank
    torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=0, atol=1e-6)
    assert torch.equal(merged["model.norm.weight"], tensors["model.norm.weight"])
    assert AutoModelForCausalLM.from_pretrained(out / "model").config.num_hidden_layers == 2
    assert main(["export", str(run), "--merge", "enable_qat=true"]) == 2
    assert main(["export", str(whole), "--merge", "--output", str(tmp_path / "no")]) == 2
    assert "has nothing to merge" in capsys.readouterr().err
