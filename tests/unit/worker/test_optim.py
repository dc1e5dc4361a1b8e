import inspect
import subprocess
import sys
from typing import get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import AutoModelForCausalLM, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR

from raytrain_adv.config.training import SCHEDULE_OPTIONS, TrainConfig
from raytrain_adv.run.schedule import resolve_arithmetic
from raytrain_adv.worker.optim import Schedule, build_optimizer, set_learning_rate
from tests.tiny_models import job_for, write_checkpoint

STEPPED = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 20, "min_lr_ratio": 0.05, "decay_type": "1-sqrt"},
}


@pytest.mark.parametrize(("kind", "options"), STEPPED.items(), ids=STEPPED)
def test_schedules_are_those_of_transformers(make_job, kind, options):
    warmup = 0 if kind == "constant" else 10
    keys = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": options}
    job = make_job(max_steps=100, warmup_steps=warmup, learning_rate=1e-3, **keys)
    schedule = Schedule(job, resolve_arithmetic(job, 1000, 1))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = get_scheduler(kind, optimizer, warmup, 100, options)
    for step in range(100):
        expected = scheduler.get_last_lr()[0]
        assert schedule.rate(step) == pytest.approx(expected, rel=1e-6, abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_schedules_import_neither_peft_nor_bitsandbytes(job_file):
    """They took a second of CPU in each worker; who needs PEFT later has it whole."""
    code = f"""
import sys
from raytrain_adv.config import load
from raytrain_adv.run.schedule import resolve_arithmetic
from raytrain_adv.worker.optim import Schedule
job = load({str(job_file())!r})
Schedule(job, resolve_arithmetic(job, 100, 1))
print({{"peft", "bitsandbytes"}} & sys.modules.keys())
from transformers import Trainer, trainer_utils
print(trainer_utils.PeftModel.__module__)
Schedule(job, resolve_arithmetic(job, 100, 1))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["set()", "peft.peft_model"]


@pytest.mark.parametrize(
    ("kind", "losses", "rate"),
    [
        ("reduce_lr_on_plateau", [2.0, 1.0, 1.0, 1.0, 1.0], 1e-4),
        ("reduce_lr_on_plateau", [5.0, 4.0, 3.0, 2.0, 1.0], 1e-3),
        ("greedy", [2.0, 1.0, 1.0, 1.0, 1.0], 1e-4),
    ],
)
def test_an_adaptive_schedule_follows_the_held_out_loss_also_after_a_resume(
    make_job, kind, losses, rate
):
    options = {"patience": 2, "factor": 0.1}
    keys = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": options, "val_size": 4}
    job = make_job(max_steps=100, learning_rate=1e-3, eval_strategy="steps", **keys)
    arithmetic = resolve_arithmetic(job, 1000, 1)
    whole, resumed = Schedule(job, arithmetic), Schedule(job, arithmetic, losses[:3])
    for loss in losses:
        whole.observe(loss)
    for loss in losses[3:]:
        resumed.observe(loss)
    assert whole.rate(7) == resumed.rate(7) == pytest.approx(rate)


def test_the_arguments_of_each_schedule_are_those_of_transformers():
    kinds = {kind.value: function for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items()}
    kinds |= {"reduce_lr_on_plateau": ReduceLROnPlateau, "greedy": GreedyLR}
    assert kinds.keys() == set(get_args(TrainConfig.model_fields["lr_scheduler_type"].annotation))
    ours = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "mode", "verbose"}
    for kind, function in kinds.items():
        taken = set(inspect.signature(function).parameters) - ours
        assert set(SCHEDULE_OPTIONS.get(kind, "").split()) == taken, kind


def test_the_first_step_of_muon_is_torchs_inside_the_layers_and_adamws_elsewhere(
    make_job, tmp_path
):
    folder = write_checkpoint("llama", tmp_path / "model")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).float() for _ in range(2))
    job = make_job(optim="muon", learning_rate=1e-2, weight_decay=0.1)
    ids = torch.arange(20)[None]
    inner = [p for n, p in theirs.named_parameters() if p.ndim == 2 and ".layers." in n]
    tables = [theirs.model.embed_tokens.weight, theirs.lm_head.weight]
    norms = [p for p in theirs.parameters() if p.ndim == 1]
    assert len(inner) + len(tables) + len(norms) == len(list(theirs.parameters()))
    rest = [{"params": tables, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    muon = torch.optim.Muon(inner, 1e-2, adjust_lr_fn="match_rms_adamw", weight_decay=0.1)
    for model, optimizers in (
        (ours, [build_optimizer(ours, job)]),
        (theirs, [muon, torch.optim.AdamW(rest, 1e-2)]),
    ):
        model(input_ids=ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_lora_plus_gives_b_a_higher_rate(tmp_path):
    folder = write_checkpoint("llama", tmp_path / "model")
    keys = {"finetuning_type": "lora", "loraplus_lr_ratio": 16.0, "learning_rate": 1e-3}
    job = job_for(folder, tmp_path / "job", **keys)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig())
    optimizer = build_optimizer(model, job)
    set_learning_rate(optimizer.param_groups, 1e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    adapters = [(name.split(".")[-3], p) for name, p in model.named_parameters() if "lora" in name]
    found = {name: rates[id(p)] for name, p in adapters}
    assert found == {"lora_A": 1e-3, "lora_B": pytest.approx(16e-3)}


def test_weight_decay_spares_biases_and_norms(make_job):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    optimizer = build_optimizer(model, make_job(weight_decay=0.1))
    decayed = [p for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]]
    assert [p.ndim for p in decayed] == [2]


def test_frozen_parameters_are_not_optimized(make_job):
    model = torch.nn.Linear(4, 4)
    model.bias.requires_grad_(False)
    optimizer = build_optimizer(model, make_job())
    assert [p for g in optimizer.param_groups for p in g["params"]] == [model.weight]
