"""LLaMA-Factory's examples of each kind train two steps of tiny models, from the keys they have."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from raytrain_adv.config import load
from raytrain_adv.data.read.entries import resolve
from tests.conftest import TINY_LLAMA, write_rows
from tests.stored_models import Tensors, awq, gptq, rewrite
from tests.tiny_models import write_checkpoint
from tests.unit.config.llamafactory.test_examples import FILES, keys_of
from tests.workers import losses, run_workers

TEMPLATES = Path("raytrain_adv/data/tokens/chat_templates/families.yaml")
MARK = re.compile(r"<[^<>\s{}]{2,}>")
WIDE = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512}
MODELS = {  # part of a model's name -> kind of tiny model
    "Qwen3.5": "qwen3_5_text", "Qwen3-30B": "qwen3_moe", "Qwen3": "qwen3",
    "DeepSeek": "deepseek_v3", "Qwen2": "qwen2", "lama": "llama",
}  # fmt: skip
HERE: dict[str, Any] = {
    "max_steps": 2, "max_samples": 8, "cutoff_len": 128, "gradient_accumulation_steps": 1,
    "save_strategy": "no", "num_sample_answers": 0, "report_to": "none", "logging_steps": 1,
    "per_device_train_batch_size": 1,
}  # fmt: skip
KINDS = (
    "ascend/qwen3_5_full_sft_fsdp2", "ascend/qwen3moe_full_sft_fsdp",
    "extras/adam_mini/qwen2_full_sft",
    "extras/asft/llama2_full_asft", "extras/dft/qwen2_full_sft", "extras/eaft/qwen25_05b_eaft_full",
    "extras/fp8/llama3_fp8_deepspeed_sft", "extras/fp8/llama3_fp8_fsdp_sft",
    "extras/fsdp_qlora/llama3_lora_sft", "extras/llama_pro/llama3_freeze_sft",
    "extras/loraplus/llama3_lora_sft", "extras/muon/qwen2_full_sft", "extras/oft/llama3_oft_sft",
    "extras/pissa/llama3_lora_sft", "extras/qoft/llama3_oft_sft_awq",
    "extras/qoft/llama3_oft_sft_bnb_npu", "ktransformers/train_lora/deepseek_v3_lora_sft_kt",
    "megatron_bridge/llama3_sft", "train_full/qwen3_full_sft", "train_lora/qwen3_lora_sft_ray",
    "train_lora/qwen3_preprocess", "train_qlora/llama3_lora_sft_aqlm",
    "train_qlora/llama3_lora_sft_gptq",
)  # fmt: skip
"""One example of each method, model and form of weights."""


def aqlm(stem: str, weight: torch.Tensor) -> Tensors:
    rows, columns = weight.shape
    return {
        f"{stem}.codes": torch.randint(-128, 128, (rows, columns // 8, 1), dtype=torch.int8),
        f"{stem}.codebooks": torch.randn(1, 256, 1, 8).half(),
        f"{stem}.scales": (torch.rand(rows, 1, 1, 1) * 0.02).half(),
    }


ROUNDED: dict[str, Any] = {
    "AWQ": ({"quant_method": "awq", "bits": 4}, awq),
    "GPTQ": ({"quant_method": "gptq", "bits": 4}, gptq(4, False)),
    "AQLM": ({"quant_method": "aqlm"}, aqlm),
}


def model_for(name: str, folder: Path) -> str:
    """Write a tiny model of the kind and the form that a model's name tells, with a tokenizer."""
    kind = next(kind for part, kind in MODELS.items() if part in name)
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.add_tokens(sorted(set(MARK.findall(TEMPLATES.read_text()))), special_tokens=True)
    sizes = {**WIDE, "vocab_size": len(tokenizer)}
    sizes |= {"num_hidden_layers": 8} if "pro" in name else {}
    write_checkpoint(kind, folder, **sizes)
    tokenizer.save_pretrained(folder)
    for form, how in ROUNDED.items():
        if form in name:
            rewrite(folder, *how)
    return str(folder)


def data_folder(folder: Path) -> Path:
    """Write the datasets that the examples name."""
    folder.mkdir(parents=True)
    write_rows(folder / "rows.json", 12)
    names = ("identity", "alpaca_en_demo", "alpaca_zh", "med", "math")
    info = {name: {"file_name": "rows.json"} for name in names}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def hub_cache(folder: Path) -> Path:
    """Write what the Hub's client keeps of the dataset llamafactory/demo_data."""
    repo = folder / "datasets--llamafactory--demo_data"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("1" * 40)
    return data_folder(repo / "snapshots" / ("1" * 40))


def job_of(name: str, folder: Path) -> Path:
    """Write an example's job, changed to what this machine and a minute allow."""
    keys = keys_of(name, folder) | HERE
    keys["model_name_or_path"] = model_for(FILES[name]["model"], folder / "model")
    if "dataset_dir" not in keys:
        keys["dataset_dir"] = str(data_folder(folder / "data"))
    keys |= {"flash_attn": "sdpa"} if keys.get("flash_attn") == "fa2" else {}
    keys |= {"fp8_allow_cpu": True, "fp8_min_features": 16} if keys.get("fp8") else {}
    keys |= {"ray_num_workers": 1} if "ray_num_workers" in keys else {}
    keys |= {"tokenized_path": str(folder / "tokenized")} if "tokenized_path" in keys else {}
    path = folder / "example.yaml"
    path.write_text(yaml.safe_dump(keys))
    return path


def test_a_remote_dataset_dir_is_a_dataset_of_the_hub(tmp_path, monkeypatch):
    folder = hub_cache(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    keys = keys_of("train_lora/qwen3_lora_sft_ray.yaml", tmp_path)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(keys))
    job = load(tmp_path / "job.yaml")
    found = resolve(job.data.dataset, job.data, "dataset")
    assert [Path(entry.target) for entry in found] == [folder / "rows.json"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_an_example_of_each_kind_trains_two_steps(name, tmp_path, monkeypatch):
    hub_cache(tmp_path / "hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))  # of processes that start now
    job = job_of(f"{name}.yaml", tmp_path)
    if "ray" in name:
        keys = yaml.safe_load(job.read_text())
        keys["dataset_dir"] = str(next((tmp_path / "hub").rglob("dataset_info.json")).parent)
        job.write_text(yaml.safe_dump(keys))
    run_workers(1, job)
    found = losses(Path(load(job).output.output_dir))
    assert list(found) == [1, 2] and all(0 < loss < 20 for loss in found.values())
