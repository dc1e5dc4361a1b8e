import pytest
import torch
from transformers import get_scheduler

from raytrain_adv.run.schedule import resolve_arithmetic
from raytrain_adv.worker.optim import build_optimizer, learning_rate


@pytest.mark.parametrize(
    ("kind", "options", "theirs"),
    [
        ("linear", {}, {}),
        ("cosine", {}, {}),
        ("constant", {}, {}),
        ("constant_with_warmup", {}, {}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}, {"min_lr_rate": 0.1}),
        ("cosine_with_min_lr", {"min_lr": 1e-4}, {"min_lr": 1e-4}),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 20, "min_lr_ratio": 0.05},
            {"num_decay_steps": 20, "min_lr_ratio": 0.05},
        ),
    ],
)
def test_schedules_are_those_of_transformers(make_job, kind, options, theirs):
    warmup = 0 if kind == "constant" else 10
    job = make_job(
        max_steps=100,
        warmup_steps=warmup,
        learning_rate=1e-3,
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=options,
    )
    arithmetic = resolve_arithmetic(job, 1000, 1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = get_scheduler(
        kind,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=100,
        scheduler_specific_kwargs=theirs,
    )
    for step in range(100):
        assert learning_rate(job, arithmetic, step) == pytest.approx(
            scheduler.get_last_lr()[0], rel=1e-6, abs=1e-12
        )
        optimizer.step()
        scheduler.step()


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
