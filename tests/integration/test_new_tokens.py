"""New tokens: rows that are filled, trained, saved, quantized, and read by PEFT."""

import json
import math
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytrain_adv.config import load
from raytrain_adv.driver.commands.export import run as export
from raytrain_adv.driver.output.replaced import RUN_FILE
from raytrain_adv.dtensor import seed_of
from raytrain_adv.errors import JobError
from raytrain_adv.hardware import detect
from raytrain_adv.model.build import build
from raytrain_adv.transforms.applied import Transforms
from tests.families import tiny_config, tiny_model
from tests.multimodal_models import TOKENIZER
from tests.tiny_models import write_checkpoint
from tests.workers import losses, run_workers

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
TOKENS = {"add_tokens": "<one>,<two>", "new_special_tokens": ["<think>"], "resize_vocab": True}
ROWS = "".join(
    f'{{"instruction": "Count <two>.", "input": "", "output": "<think>{n}</think> <one>"}}\n'
    for n in range(16)
)


def checkpoint(kind: str, folder: Path, **shapes: int) -> Path:
    """Write a tiny model whose embedding has just the rows that its tokenizer needs."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    shapes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, **shapes}
    write_checkpoint(kind, folder, **shapes)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def job(job_file, tmp_path):
    """Return what writes a job on a tiny model with new tokens."""
    rows = tmp_path / "thoughts.jsonl"
    rows.write_text(ROWS)

    def write(kind, name, **keys):
        folder = tmp_path / kind
        if not folder.is_dir():
            checkpoint(kind, folder)
        common = {"model_name_or_path": str(folder), "train_from_scratch": False, "max_steps": 4}
        common |= {"template": "default", "dataset": str(rows), "output_dir": str(tmp_path / name)}
        return job_file(f"{name}.yaml", **{**common, **TOKENS, **keys})

    return write


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_peft_loads_the_adapter_on_the_resized_base_to_equal_logits(kind, job, tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2, "finetuning_type": "lora"}
    run_workers(2, job(kind, "whole", **saved), job(kind, "part", **saved))
    (tmp_path / "part/checkpoints/local/step_00000004/manifest.json").unlink()
    run_workers(2, job(kind, "part", **saved, resume_from_checkpoint=True))
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    adapter, again = (
        load_file(tmp_path / name / "model/adapter_model.safetensors") for name in ("whole", "part")
    )
    assert all(torch.equal(adapter[name], again[name]) for name in adapter)
    held = {name.removeprefix("base_model.model.") for name in adapter if "lora_" not in name}
    assert held == set(TABLES)

    record = {"job": load(tmp_path / "whole.yaml").flat()}
    (tmp_path / "whole" / RUN_FILE).write_text(json.dumps(record))
    export(str(tmp_path / "whole"), "", str(tmp_path / "merged"), [], merge=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole/model")
    ids = tokenizer("<one> and <two> <think>", return_tensors="pt")["input_ids"]
    assert {"<one>", "<two>", "<think>"} <= set(tokenizer.convert_ids_to_tokens(ids[0]))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype=torch.float32)
    rows = adapter[f"base_model.model.{TABLES[0]}"].shape[0]
    assert rows % 64 == 0 and rows >= len(tokenizer) > base.config.vocab_size
    base.resize_token_embeddings(rows, mean_resizing=False)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged/model", dtype=torch.float32)
    assert ours.config.vocab_size == rows
    theirs = PeftModel.from_pretrained(base, tmp_path / "whole/model")
    torch.testing.assert_close(logits(theirs, ids), logits(ours, ids), rtol=1e-5, atol=1e-5)


def test_one_worker_without_a_gpu_saves_tied_tables_under_both_names(job, tmp_path):
    """It holds them once: safetensors refused them after the last step."""
    run_workers(1, job("llama-tied", "one", finetuning_type="lora"))
    adapter = load_file(tmp_path / "one/model/adapter_model.safetensors")
    embedding, head = (adapter[f"base_model.model.{table}"] for table in TABLES)
    assert torch.equal(embedding, head)


@pytest.mark.parametrize("kind", ["gemma4_text", "bert"])
def test_every_table_and_bias_with_a_row_for_each_token_is_trained_and_saved(kind, job, tmp_path):
    """Gemma 4 has a table for its layers; BERT's head has a bias of two names."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    sizes = dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], len(tokenizer))
    tiny_model(
        kind, **{k: n for k, n in sizes.items() if hasattr(tiny_config(kind), k)}
    ).save_pretrained(tmp_path / kind)
    tokenizer.save_pretrained(tmp_path / kind)
    rounded = {"enable_qat": True, "qat_quantize_embedding": True, "qat_group_size": None}
    jobs = [job(kind, "plain", finetuning_type="lora", save_strategy="steps", save_steps=4)]
    if kind == "gemma4_text":
        jobs += [job(kind, "rounded", finetuning_type="lora", **rounded)]
    differences = [found["quantized_logit_difference"] for found in run_workers(1, *jobs)]
    assert differences == [None, 0.0][: len(jobs)]
    record = {"job": load(jobs[0]).flat()}
    (tmp_path / "plain" / RUN_FILE).write_text(json.dumps(record))
    export(str(tmp_path / "plain"), "", str(tmp_path / "merged"), [], merge=True)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged/model", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype=torch.float32)
    base.resize_token_embeddings(ours.config.vocab_size, mean_resizing=False)
    theirs = PeftModel.from_pretrained(base, tmp_path / "plain/model")
    ids = torch.arange(len(tokenizer) - 9, len(tokenizer) + 3)[None]
    torch.testing.assert_close(logits(theirs, ids), logits(ours, ids), rtol=1e-4, atol=1e-4)


def test_a_model_with_another_row_for_each_token_is_refused(job, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tiny_model("deepseek_v4", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "deepseek_v4")
    tokenizer.save_pretrained(tmp_path / "deepseek_v4")
    with pytest.raises(JobError, match="cannot get new tokens") as refused:
        build(load(job("deepseek_v4", "one")))
    assert "tid2eid" in refused.value.found


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_a_four_bit_base_with_new_rows_is_merged_as_it_was_trained(kind, job, tmp_path):
    source = checkpoint(kind, tmp_path / kind, hidden_size=64, intermediate_size=128)
    saved = {"save_strategy": "steps", "save_steps": 2, "finetuning_type": "lora"}
    run_workers(2, job(kind, "four", **saved, quantization_bit=4, lora_rank=4))
    record = {"job": load(tmp_path / "four.yaml").flat()}
    (tmp_path / "four" / RUN_FILE).write_text(json.dumps(record))
    export(str(tmp_path / "four"), "", str(tmp_path / "merged"), [], merge=True)
    adapter = load_file(tmp_path / "four/model/adapter_model.safetensors")
    merged = load_file(tmp_path / "merged/model/model.safetensors")
    for table in TABLES if kind == "llama" else TABLES[:1]:
        assert torch.equal(merged[table], adapter[f"base_model.model.{table}"])
    name = "model.layers.1.mlp.up_proj"
    plain = load_file(source / "model.safetensors")[f"{name}.weight"].float()
    packed = bnb.functional.quantize_4bit(plain, compress_statistics=True, quant_type="nf4")
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    expected = bnb.functional.dequantize_4bit(*packed) + 2.0 * b @ a  # alpha is twice the rank
    torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=0, atol=1e-6)
    assert b.any() and not torch.equal(expected, plain)


def test_new_rows_are_the_mean_and_noise_and_the_others_are_the_checkpoints(job, tmp_path):
    """At a learning rate of almost nothing the exported tables are those it began with."""
    keys = {"learning_rate": 1e-12, "max_steps": 1, "loss_kernel": "chunked"}
    run_workers(1, job("llama", "one", gradient_accumulation_steps=2, **keys))
    run_workers(2, job("llama", "two", **keys))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-5)
    before = load_file(tmp_path / "llama/model.safetensors")
    after = load_file(tmp_path / "two/model/model.safetensors")
    for name in TABLES:
        held = before[name].float()
        count = after[name].shape[0] - held.shape[0]
        draw = torch.Generator().manual_seed(seed_of(42, f"rows of {name}"))
        noise = torch.randn(count, held.shape[1], generator=draw) / math.sqrt(held.shape[1])
        torch.testing.assert_close(after[name][: len(held)].float(), held, rtol=0, atol=1e-6)
        new = (held.mean(0) + noise).bfloat16().float()  # the dtype of the checkpoint
        torch.testing.assert_close(after[name][len(held) :].float(), new, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama-tied", pytest.param("llama", marks=pytest.mark.slow)])
def test_quantized_embeddings_with_new_rows_are_exported_bit_for_bit(kind, job, tmp_path):
    rounded = {"enable_qat": True, "bf16": True, "qat_quantize_embedding": True}
    jobs = [
        job(kind, how, **rounded, finetuning_type=how, qat_group_size=None)
        for how in ("full", "lora")
    ]
    for figures in run_workers(2, *jobs):
        assert figures["quantized_logit_difference"] == 0.0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"resize_vocab": False}, "new tokens need rows"),
        ({"add_tokens": "<think>"}, "keep it in one of them"),
        ({"additional_target": "embed_tokens"}, "no adapters"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(given, said, job):
    with pytest.raises(JobError, match=said):
        load(job("llama", "wrong", **given))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"additional_target": "norm"}, "rows that would not be trained"),
        ({"additional_target": "embed"}, "matches no module"),
    ],
)
def test_new_rows_that_would_stay_as_they_are_are_refused(given, said, job):
    loaded = load(job("llama", "wrong", finetuning_type="lora", **given))
    with pytest.raises(JobError, match=said):
        Transforms(loaded).plan(build(loaded), detect(torch.device("cpu")))
