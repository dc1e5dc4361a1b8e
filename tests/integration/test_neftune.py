"""NEFTune through the line: on by its numbers, and the same run however it is spread."""

import json
from pathlib import Path

import pytest

from tests.integration.test_line_without_ray import kill_last_checkpoint
from tests.workers import losses, run_workers

NOISY = {"neftune_noise_alpha": 15}
SAVED = {"save_strategy": "steps", "save_steps": 3}
FULL = {"gradient_checkpointing": "full", "disable_gradient_checkpointing": False}
PACKED = {"neat_packing": True, "per_device_train_batch_size": 1}


def test_noise_does_not_depend_on_workers_batches_recomputation_or_a_restart(
    job_file, keys, tmp_path
):
    config = Path(keys["model_name_or_path"]) / "config.json"  # dropout depends on micro-batches
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.0}))

    def job(name, **changed):
        return job_file(f"{name}.yaml", output_dir=str(tmp_path / name), **changed)

    run_workers(
        2,
        job("plain"),
        job("two", **NOISY),
        job("part", **NOISY, **SAVED),
        job("full", **NOISY, **FULL),
        job("small", **NOISY, per_device_train_batch_size=1, gradient_accumulation_steps=2),
        job("packed", **NOISY, **PACKED),
    )
    kill_last_checkpoint(tmp_path / "part")
    again = job("part2", **NOISY, **SAVED, resume_from_checkpoint=True)
    again.write_text(again.read_text().replace(str(tmp_path / "part2"), str(tmp_path / "part")))
    assert run_workers(2, again)[0]["resumed_from_step"] == 3
    run_workers(
        1,
        job("one", **NOISY, gradient_accumulation_steps=2),
        job("wide", **NOISY, per_device_train_batch_size=4),
        job("packed-one", **NOISY, **PACKED, gradient_accumulation_steps=2),
    )
    found = {path.name: losses(path) for path in tmp_path.iterdir() if (path / "model").is_dir()}
    expected = found["two"]
    assert found["part"] == expected and found["full"] == expected
    assert expected[1] != found["plain"][1]
    for name, reference in {
        "small": "two",
        "one": "two",
        "wide": "two",
        "packed-one": "packed",
    }.items():
        close = pytest.approx(list(found[reference].values()), rel=2e-5)
        assert list(found[name].values()) == close, name
    report = (tmp_path / "two" / "metrics.jsonl").read_text()
    assert "neftune" not in report  # nothing is missing: the profile has the noise
