"""Two finished tiny runs, trained without Ray: LoRA in bf16, and QAT, each with held-out rows."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from raytrain_adv.config import load
from raytrain_adv.driver.output.output_dir import Output
from raytrain_adv.driver.output.replaced import Replaced
from tests.conftest import tiny_keys
from tests.workers import run_workers

RUNS = {
    "lora": {"finetuning_type": "lora", "bf16": True, "lora_rank": 4},
    "qat": {"enable_qat": True, "qat_weight_dtype": "int4", "qat_group_size": 32},
}


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the output_dir of each run."""
    root = tmp_path_factory.mktemp("runs")
    keys = tiny_keys(root) | {"train_from_scratch": False, "val_size": 9, "max_steps": 2}
    keys |= {"default_system": "Count.", "per_device_eval_batch_size": 4}
    base = Path(keys["model_name_or_path"])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).save_pretrained(base)
    files = []
    for name, more in RUNS.items():
        files.append(root / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump(keys | more | {"output_dir": str(root / name)}))
    run_workers(1, *files)
    for file in files:
        finish(load(file))
    return {name: root / name for name in RUNS}


def finish(job) -> None:
    """Leave what the driver leaves: run.json."""
    folder = Path(job.output.output_dir)
    Output(folder, "", "", False, False, 1, Replaced(folder, (), [], None)).note(job, "done", 1)


def last_eval_loss(folder: Path) -> float:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["kind"] == "eval"][-1]
