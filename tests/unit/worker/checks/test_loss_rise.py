"""A rise of the loss with a feature on is reported once, with what of its keys to try."""

import random

import pytest

from raytrain_adv.transforms.qat import Qat
from raytrain_adv.worker.checks.loss_guard import WINDOW, LossRise


def reported(losses, **keys):
    lines = []
    rise = LossRise([Qat(enable_qat=True, **keys)], lines.append)
    for done, loss in enumerate(losses, 1):
        rise.add(done, loss)
    return lines


def around(mean, count=WINDOW):
    return [mean + 0.1 * (-1) ** n for n in range(count)]


def test_a_rise_after_the_switch_is_reported_once_with_both_losses():
    losses = [4, 3, *around(2), *around(3), *around(5)]
    (line,) = reported(losses, fake_quant_after_n_steps=12)
    assert line.startswith("the loss has risen from 2.0000 to 3.0000 with QAT")
    assert "raise fake_quant_after_n_steps (now 12)" in line


@pytest.mark.parametrize(
    ("losses", "keys"),
    [
        ([4, 3, *around(2), *around(2)], {"fake_quant_after_n_steps": 12}),
        ([*around(2), 9, *around(2, WINDOW - 1)], {"fake_quant_after_n_steps": 10}),  # a bad batch
        ([*around(1), *around(3, 20)], {"fake_quant_after_n_steps": 30}),  # before it began
        ([*around(1), *around(3, 20)], {"fake_quant_after_n_steps": "never"}),
        ([9 - 0.1 * n for n in range(60)], {}),
    ],
)
def test_nothing_is_reported_if_the_loss_falls_or_rises_without_it(losses, keys):
    assert reported(losses, **keys) == []


def test_a_rise_since_the_first_step_is_compared_with_the_first_losses():
    assert len(reported([*around(1), *around(1), *around(2)])) == 1


@pytest.mark.parametrize("noise", [0.05, 0.2, 0.5])
def test_a_flat_noisy_loss_is_rarely_called_a_rise(noise):
    """Medians of three were compared: 20 to 80 % of such runs were told to begin later."""
    runs = 100
    false = 0
    for seed in range(runs):
        draw = random.Random(seed)
        losses = [2 * draw.lognormvariate(0, noise) for _ in range(400)]
        false += bool(reported(losses, fake_quant_after_n_steps=50))
    assert false <= 0.04 * runs


@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_a_rise_by_a_third_is_seen_through_the_noise(noise):
    seen = 0
    for seed in range(50):
        draw = random.Random(seed)
        before = [2 * draw.lognormvariate(0, noise) for _ in range(50)]
        since = [2.7 * draw.lognormvariate(0, noise) for _ in range(30)]
        seen += bool(reported([*before, *since], fake_quant_after_n_steps=50))
    assert seen >= 48


def test_a_run_of_weeks_keeps_no_more_losses_than_a_short_one():
    """It kept all of them, and went through them at each logged step."""
    rise = LossRise([Qat(enable_qat=True, fake_quant_after_n_steps=5000)], print)
    for done in range(1, 10_001):
        rise.add(done, 2.0)
    ((_, before, since),) = rise.watched
    assert len(before) + len(since) <= 2 * WINDOW
