"""Sequences that workers share, on CPU processes over gloo: the run of one worker."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.workers import column, events, losses, run_workers

TWO = {"sequence_parallel_size": 2, "ray_num_workers": 2}


def change_model(keys, **changed):
    """Change the config of the tests' model, in which dropout is off: it draws by worker."""
    path = Path(keys["model_name_or_path"]) / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "attention_dropout": 0.0, **changed})
    )


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def assert_same_run(one, other):
    expected = list(losses(one).values())
    assert len(expected) == 6 and expected[-1] < expected[0] - 0.1
    assert list(losses(other).values()) == pytest.approx(expected, rel=2e-5)
    assert column(other, "num_tokens") == column(one, "num_tokens")
    assert column(other, "num_label_tokens") == column(one, "num_label_tokens")
    assert column(other, "grad_norm") == pytest.approx(column(one, "grad_norm"), rel=2e-3)
    for name, weight in weights(one).items():
        torch.testing.assert_close(weights(other)[name], weight, rtol=1e-3, atol=2e-4, msg=name)


CASES = {
    "padded": {},
    "packed": {"neat_packing": True, "per_device_train_batch_size": 1},
    "packed, eager": {"neat_packing": True, "flash_attn": "disabled"},
    "joined": {"packing": True, "gradient_accumulation_steps": 2},
    "recomputed": {"gradient_checkpointing": "full", "disable_gradient_checkpointing": False},
    "evaluated": {"val_size": 8, "eval_on_start": True, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("key_heads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_workers_that_share_sequences_train_as_one(job_file, keys, tmp_path, key_heads):
    change_model(keys, num_key_value_heads=key_heads)
    ones, twos = [], []
    for name, case in CASES.items():
        for jobs, workers in ((ones, {}), (twos, TWO)):
            out = str(tmp_path / f"{name} {len(workers)}")
            jobs.append(job_file(f"{name}{len(workers)}.yaml", output_dir=out, **case, **workers))
    run_workers(1, *ones)
    run_workers(2, *twos)
    for name in CASES:
        assert_same_run(tmp_path / f"{name} 0", tmp_path / f"{name} 2")
    (tried,) = events(tmp_path / "packed 2", "sequence_parallel")
    assert "2 workers of a host share each sequence" in tried["message"]
    found = [[r for r in events_of(tmp_path / f"evaluated {n}")] for n in (0, 2)]
    assert found[1] == pytest.approx(found[0], rel=2e-5) and len(found[0]) == 2


def events_of(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["kind"] == "eval"]


GROUPS = {
    "plain": {"seed": 3},
    "lora": {"finetuning_type": "lora", "lora_target": "all"},
    "compiled": {"torch_compile": True, "gradient_checkpointing": "selective"},
}
FAST = "plain", "lora"
COMPILED = pytest.param(["compiled"], marks=pytest.mark.slow)


@pytest.mark.parametrize("names", [FAST, COMPILED], ids=" ".join)
def test_groups_that_share_sequences_train_as_workers_that_do_not(job_file, keys, tmp_path, names):
    """Two groups of two workers, and two workers that do not share; adapters, compiled layers."""
    change_model(keys)
    shared = {"sequence_parallel_size": 2, "ray_num_workers": 4}
    both = {True: [], False: []}
    for name in names:
        case = {"disable_gradient_checkpointing": name != "compiled", **GROUPS[name]}
        for shares, jobs in both.items():
            out, how = str(tmp_path / f"{name} {shares}"), shared if shares else {}
            if name == "lora":
                case |= {"model_name_or_path": base(tmp_path), "train_from_scratch": False}
            file = f"{name}{shares}.yaml"
            jobs.append(job_file(file, output_dir=out, **{"ray_num_workers": 2, **case, **how}))
    run_workers(2, *both[False])
    run_workers(4, *both[True])
    for name in names:
        one, other = (losses(tmp_path / f"{name} {shares}") for shares in (False, True))
        assert list(other.values()) == pytest.approx(list(one.values()), rel=1e-4), name
        assert len(one) == len(set(one.values())) == 6, name


def base(tmp_path):
    return str(tmp_path / "plain False" / "model")


def test_a_run_resumes_with_sequences_that_more_workers_share(job_file, keys, tmp_path):
    change_model(keys)
    out = tmp_path / "out"
    often = {"save_strategy": "steps", "save_steps": 3}
    run_workers(1, job_file("a.yaml", **often))
    expected = list(losses(out).values())
    (out / "checkpoints" / "local" / "step_00000006" / "manifest.json").unlink()
    (figures,) = run_workers(2, job_file("b.yaml", resume_from_checkpoint=True, **often, **TWO))
    assert figures["resumed_from_step"] == 3
    assert list(losses(out).values()) == pytest.approx(expected, rel=1e-4)
