"""A rise of the loss with a feature on is told once, with what of its keys to try."""

import pytest

from raytrain_adv.transforms.qat import Qat
from raytrain_adv.worker.checks.convergence import Convergence


def told(losses, **keys):
    said = []
    watch = Convergence([Qat(enable_qat=True, **keys)], said.append)
    for done, loss in enumerate(losses, 1):
        watch.see(done, loss)
    return said


def test_a_rise_after_the_switch_is_told_once_with_both_losses():
    (line,) = told([4, 3, 2, 2, 2, 3, 3, 3, 5, 6, 7], fake_quant_after_n_steps=5)
    assert line.startswith("the loss has risen from 2.0000 to 3.0000 with QAT")
    assert "raise fake_quant_after_n_steps (now 5)" in line


@pytest.mark.parametrize(
    ("losses", "keys"),
    [
        ([4, 3, 2, 2, 2, 2, 2, 2, 2], {"fake_quant_after_n_steps": 5}),
        ([4, 3, 2, 2, 2, 9, 1, 1, 1], {"fake_quant_after_n_steps": 5}),  # one bad batch
        ([1, 1, 1, 2, 3, 4, 5], {"fake_quant_after_n_steps": 7}),  # before it began
        ([1, 1, 1, 2, 3, 4, 5], {"fake_quant_after_n_steps": "never"}),
        ([9, 8, 7, 6, 5, 4, 3], {}),
    ],
)
def test_nothing_is_told_of_a_loss_that_falls_or_rises_without_it(losses, keys):
    assert told(losses, **keys) == []


def test_a_rise_since_the_first_step_is_held_against_the_first_losses():
    assert len(told([1, 1, 1, 1, 2, 3])) == 1


def test_a_run_of_weeks_keeps_no_more_losses_than_a_short_one():
    """It kept all of them, and went through them at each logged step."""
    watch = Convergence([Qat(enable_qat=True, fake_quant_after_n_steps=5000)], print)
    for done in range(1, 10_001):
        watch.see(done, 2.0)
    (seen,) = watch.seen
    assert len(seen.off) + len(seen.first) + len(seen.later) == 9
