"""Train, adapt, quantize, export and reload real checkpoints, and compare the losses.

    python -m tests.real_checkpoints ROWS.json FOLDER [FOLDER ...]

ROWS.json are Alpaca's rows, a FOLDER is a checkpoint with its tokenizer. For each feature a
line has the held-out loss in training, and the exported folder's in transformers or PEFT. Adapters
of a quantized base are loaded on its values.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch

from tests.family_runs import KEYS, Family, read_batch, reloaded

FEATURES = ("full", "LoRA", "QLoRA", "FP8 base", "QAT int8", "QAT int4")
FP8_BASE = {
    "finetuning_type": "lora",
    "quantization_bit": 8,
    "quantization_type": "fp8",
    "quantization_products": "dequantized",
}
SHORT = {"cutoff_len": 96, "per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 1e-4}


class Real(Family):
    """A real checkpoint in its folder, instead of a tiny one."""

    keys: ClassVar[dict[str, dict[str, Any]]] = {**KEYS, "FP8 base": FP8_BASE}
    source: Path

    @property
    def checkpoint(self) -> Path:
        """Where the checkpoint is."""
        return self.source


def try_checkpoint(source: Path, rows: Path, folder: Path) -> None:
    """Print for each feature the losses in training and after reloading."""
    family = Real(source.name, folder)
    family.source = source
    (folder / "rows.json").write_text(json.dumps(json.loads(rows.read_text())[:8]))
    family.batch = read_batch(family.job("plain", **SHORT))
    for feature in FEATURES:
        run = family.run(feature, **SHORT)
        first, last = run.steps[0][0], run.steps[-1][0]
        line = (
            f"{source.name}, {feature}: loss {first:.4f} to {last:.4f}, held out {run.held_out:.5f}"
        )
        keys = family.keys[feature]
        quantized = feature if "quantization_bit" in keys else ""
        loss = reloaded(family, run, "finetuning_type" in keys, quantized)
        print(f"{line}, reloaded {loss:.5f}", flush=True)


def main() -> None:
    """Try each checkpoint that is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    given = parser.parse_args()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29641"}
    torch.set_num_threads(1)
    for source in given.folders:
        with tempfile.TemporaryDirectory(prefix="real_") as folder:
            try_checkpoint(source, given.rows, Path(folder))


if __name__ == "__main__":
    main()
