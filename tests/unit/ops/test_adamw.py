"""AdamW with the clip factor in the step, against clipping and then torch's AdamW."""

import copy

import torch

from raytrain_adv.ops.adamw import ClippingAdamW
from raytrain_adv.worker.checks.step import clip

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def models():
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
    return ours, copy.deepcopy(ours)


def run(model, optimizer, max_norm, steps=4):
    """Take steps and return the norms before clipping."""
    norms = []
    torch.manual_seed(1)
    for _ in range(steps):
        model(torch.randn(5, 8)).square().sum().backward()
        norms.append(clip(optimizer, max_norm))
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(norms)


def test_it_steps_as_clipping_and_then_torchs_fused_adamw():
    ours, theirs = models()
    first = run(ours, ClippingAdamW(ours.parameters(), **OPTIONS), max_norm=0.5)
    reference = torch.optim.AdamW(theirs.parameters(), fused=True, **OPTIONS)
    second = run(theirs, reference, max_norm=0.5)
    assert first.min() > 0.5  # it did clip
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_no_clipping_leaves_gradients_alone():
    ours, theirs = models()
    run(ours, ClippingAdamW(ours.parameters(), **OPTIONS), max_norm=0.0)
    run(theirs, torch.optim.AdamW(theirs.parameters(), fused=True, **OPTIONS), max_norm=0.0)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_its_states_are_torchs():
    ours, theirs = models()
    own = ClippingAdamW(ours.parameters(), **OPTIONS)
    run(ours, own, max_norm=1.0)
    reference = torch.optim.AdamW(theirs.parameters(), fused=True, **OPTIONS)
    reference.load_state_dict(own.state_dict())
    kept = reference.state_dict()["state"][0]
    assert kept.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert kept["step"] == 4
