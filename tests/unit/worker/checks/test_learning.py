import math
import random

import pytest

from raytrain_adv.worker.checks.learning import LearningCheck

VOCABULARY = 4096
GUESS = math.log(VOCABULARY)
LOWER = "lower learning_rate"


def told(losses, evaluations=None, norm=1.0):
    said = []
    check = LearningCheck(VOCABULARY, lambda sentence, event: said.append(sentence), LOWER)
    for step, loss in enumerate(losses, 1):
        check.add(step, {"loss": loss, "grad_norm": norm})
    check.finish(evaluations or {})
    return said


def test_a_loss_of_guessing_from_the_first_step_on_is_told_once():
    """learning_rate: 5000 ends so."""
    said = told([GUESS + 0.01 * (i % 2) for i in range(40)])
    assert len(said) == 1 and "ln(vocabulary)" in said[0] and "lower learning_rate" in said[0]


def test_a_model_that_falls_back_to_guessing_is_told():
    said = told([2.0] * 10 + [GUESS] * 20)
    assert len(said) == 1 and "again" in said[0]


def test_gradients_that_are_all_zero_are_told():
    said = told([3.0] * 20, norm=0.0)
    assert "all gradients are zero" in said[0]


def test_a_loss_that_rises_is_told():
    said = told([1.0 + 0.1 * i for i in range(40)])
    assert len(said) == 1 and "has risen" in said[0]


def test_a_loss_that_never_fell_is_told_unless_held_out_rows_say_otherwise():
    flat = [3.0 + 0.1 * (-1) ** i for i in range(40)]
    assert "has not fallen" in told([*flat, 3.1])[0]
    assert told([*flat, 3.1], {"10": {"loss": 3.0}, "40": {"loss": 2.5}}) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_noisy_loss_that_falls_is_no_alarm(seed):
    draw = random.Random(seed)
    assert told([3 - 0.02 * i + draw.gauss(0, 0.3) for i in range(60)]) == []


def test_training_from_scratch_begins_at_guessing_and_is_no_alarm():
    assert told([GUESS, GUESS, 8.0, 7.5, *[7 - 0.1 * i for i in range(40)]]) == []
