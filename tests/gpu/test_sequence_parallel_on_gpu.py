"""Sequences that two GPUs share: the losses of one GPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workers import events, losses, run_workers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "float32": ({"bf16": False}, 1e-4),
    "compiled": ({"bf16": True, "torch_compile": True}, 1e-2),
    "packed": ({"bf16": True, "neat_packing": True, "per_device_train_batch_size": 1}, 1e-2),
    "fp8": ({"pure_bf16": True, "fp8": True, "fp8_min_features": 16}, 3e-2),
}
"""Name -> keys, and the relative error of losses that rounding explains."""


def test_two_gpus_that_share_sequences_train_as_one(
    job_file: Any, keys: Any, tmp_path: Path
) -> None:
    path = Path(keys["model_name_or_path"]) / "config.json"
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "attention_dropout": 0.0}
    path.write_text(json.dumps({**json.loads(path.read_text()), **sizes}))
    ones, twos = [], []
    full = {"gradient_checkpointing": "full", "disable_gradient_checkpointing": False}
    for name, (case, _) in CASES.items():
        values = {"learning_rate": 1e-3, **full, **case}
        ones.append(job_file(f"{name}1.yaml", output_dir=str(tmp_path / f"{name} 1"), **values))
        values |= {"sequence_parallel_size": 2, "ray_num_workers": 2}
        twos.append(job_file(f"{name}2.yaml", output_dir=str(tmp_path / f"{name} 2"), **values))
    run_workers(1, *ones)
    run_workers(2, *twos)
    for name, (_, allowed) in CASES.items():
        one, two = (list(losses(tmp_path / f"{name} {n}").values()) for n in (1, 2))
        assert two == pytest.approx(one, rel=allowed), name
        assert one[-1] < one[0], name
        assert events(tmp_path / f"{name} 2", "sequence_parallel")
