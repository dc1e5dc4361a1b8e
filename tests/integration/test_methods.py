"""Ways to train that LLaMA-Factory has, by what they leave in the exported model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raytrain_adv.config import load
from raytrain_adv.errors import JobError
from raytrain_adv.hardware import detect
from raytrain_adv.model.build import build
from raytrain_adv.transforms.applied import Transforms
from tests.workers import losses, run_workers

TRAINED = {
    "freeze": ({"freeze_trainable_layers": 1}, ["model.layers.1."]),
    "first": ({"freeze_trainable_layers": -1}, ["model.layers.0."]),
    "modules": (
        {
            "freeze_trainable_layers": 2,
            "freeze_trainable_modules": "mlp",
            "freeze_extra_modules": "norm",
        },
        ["model.layers.0.mlp.", "model.layers.1.mlp.", "model.norm."],
    ),
    "llama_pro": ({"use_llama_pro": True, "freeze_trainable_layers": 1}, ["model.layers.1."]),
}


@pytest.fixture
def base(job_file: Any, tmp_path: Path) -> dict[str, Any]:
    """Train a model, and return the keys that go on from it."""
    run_workers(1, job_file("base.yaml", output_dir=str(tmp_path / "base"), max_steps=2))
    model = str(tmp_path / "base" / "model")
    return {"model_name_or_path": model, "train_from_scratch": False, "max_steps": 2}


def changed(before: dict[str, torch.Tensor], out: Path) -> set[str]:
    after = load_file(out / "model" / "model.safetensors")
    assert after.keys() == before.keys()
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def test_frozen_layers_do_not_change_and_the_others_do(job_file, tmp_path, base):
    before = load_file(Path(base["model_name_or_path"]) / "model.safetensors")
    jobs = [
        job_file(
            f"{n}.yaml",
            **base,
            **{"finetuning_type": "freeze", **k, "output_dir": str(tmp_path / n)},
        )
        for n, (k, _) in TRAINED.items()
    ]
    run_workers(2, *jobs)
    for name, (_, prefixes) in TRAINED.items():
        found = changed(before, tmp_path / name)
        assert found == {n for n in before if n.startswith(tuple(prefixes))}, name


@pytest.mark.slow
def test_losses_that_weigh_tokens_train_otherwise_and_are_evaluated_alike(job_file, tmp_path, base):
    kinds = {
        "plain": {},
        "dft": {"use_dft_loss": True},
        "eaft": {"use_eaft_loss": True},
        "asft": {"use_asft_loss": True, "asft_alpha": 5.0},
        "none": {"use_asft_loss": True, "asft_alpha": 0.0},
    }
    common = {**base, "val_size": 4, "eval_on_start": True, "attention_dropout": 0.0}
    del common["attention_dropout"]
    jobs = [
        job_file(f"{n}.yaml", **common, **k, output_dir=str(tmp_path / n)) for n, k in kinds.items()
    ]
    run_workers(2, *jobs)
    first = {name: losses(tmp_path / name)[1] for name in kinds}
    second = {name: losses(tmp_path / name)[2] for name in kinds}
    assert first["dft"] < first["plain"] and first["eaft"] != first["plain"]
    assert first["asft"] == pytest.approx(first["dft"], rel=0.05)  # dropout alone parts the models
    assert first["none"] == first["dft"] and second["none"] == second["dft"]
    assert second["asft"] > second["dft"]


def test_a_run_goes_on_from_an_adapter(job_file, tmp_path, base):
    """At a learning rate of almost nothing the exported adapter is the one it went on from."""
    first, second = tmp_path / "first", tmp_path / "second"
    lora = {**base, "finetuning_type": "lora", "lora_rank": 4}
    go_on = {"adapter_name_or_path": str(first / "model"), "output_dir": str(second)}
    run_workers(2, job_file("first.yaml", **lora, output_dir=str(first)))
    run_workers(2, job_file("second.yaml", **{**lora, **go_on, "learning_rate": 1e-12}))
    before, after = (
        load_file(out / "model" / "adapter_model.safetensors") for out in (first, second)
    )
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)
    assert any(before[name].abs().max() > 0 for name in before if "lora_B" in name)
    job = load(job_file("other.yaml", **{**lora, **go_on, "lora_rank": 8}))
    with pytest.raises(JobError, match="lora_rank is 4"):
        Transforms(job).plan(build(job), detect(torch.device("cpu")))
