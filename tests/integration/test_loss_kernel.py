"""The chunked loss, which is the default, in whole runs on CPU processes over gloo: the losses of
the torch loss.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.workers import losses, run_workers


def eval_losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "eval"]


def tie(folder: str, tied: bool) -> None:
    config = Path(folder) / "config.json"
    values = {**json.loads(config.read_text()), "tie_word_embeddings": tied}
    config.write_text(json.dumps(values))


@pytest.mark.parametrize("tied", [True, False])
def test_losses_are_those_of_plain_logits_on_one_worker_and_on_two(job_file, keys, tmp_path, tied):
    """Sharded, accumulated over two micro-batches, evaluated; the layout's dropout is on."""
    tie(keys["model_name_or_path"], tied)
    same = {"gradient_accumulation_steps": 2, "val_size": 9, "per_device_eval_batch_size": 2}

    def job(name, **changed):
        return job_file(f"{name}.yaml", output_dir=str(tmp_path / name), **same, **changed)

    run_workers(1, job("torch-1", loss_kernel="torch"), job("chunked-1"))
    run_workers(2, job("torch-2", loss_kernel="torch"), job("chunked-2", bf16=False))
    for workers in (1, 2):
        reference, found = tmp_path / f"torch-{workers}", tmp_path / f"chunked-{workers}"
        expected = list(losses(reference).values())
        assert len(expected) == 6 and expected[-1] < expected[0] - 0.1
        assert list(losses(found).values()) == pytest.approx(expected, rel=2e-5)
        rows = (found / "metrics.jsonl").read_text()
        assert "checked before training on 64 random tokens" in rows
        assert eval_losses(found) == pytest.approx(eval_losses(reference), rel=2e-5)


def test_adapters_on_the_head_train_as_with_plain_logits_on_two_workers(job_file, keys, tmp_path):
    """In bf16, whose rounding is what the two may differ by."""
    source = keys["model_name_or_path"]
    tie(source, False)
    torch.manual_seed(0)  # by chance adapters may learn less than is asked for below
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source)).save_pretrained(source)
    lora = {
        "train_from_scratch": False,
        "finetuning_type": "lora",
        "lora_target": "q_proj,lm_head",
        "bf16": True,
    }
    jobs = [
        job_file(f"{k}.yaml", output_dir=str(tmp_path / k), loss_kernel=k, **lora)
        for k in ("torch", "chunked")
    ]
    run_workers(2, *jobs)
    expected, found = (list(losses(tmp_path / k).values()) for k in ("torch", "chunked"))
    assert expected[-1] < expected[0] - 0.1
    assert found == pytest.approx(expected, rel=2e-3)
