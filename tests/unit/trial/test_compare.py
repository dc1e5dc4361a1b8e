"""One measure of how far a result is from the exact one."""

import math

import pytest
import torch

from raytrain_adv.trial.compare import differences, relative_error


def test_the_error_is_relative_in_norm():
    exact = torch.tensor([[3.0, 4.0]])
    assert relative_error(exact.bfloat16(), exact) == 0.0
    assert relative_error(torch.tensor([[3.0, 4.5]]), exact) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("found", "exact"),
    [
        (torch.ones(2), torch.ones(3)),
        (torch.tensor([math.nan]), torch.ones(1)),
        (torch.tensor([math.inf]), torch.ones(1)),
        (torch.ones(1), torch.zeros(1)),
    ],
)
def test_what_cannot_be_compared_is_infinitely_far(found, exact):
    assert relative_error(found, exact) == math.inf


def test_nothing_differs_from_nothing():
    assert relative_error(torch.ones(0), torch.ones(0)) == 0.0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0


def test_an_error_that_is_nan_is_a_difference():
    allowed = {"value": 0.1, "gradient": 0.1}
    lines = differences({"value": 0.05, "gradient": math.nan}, allowed)
    assert len(lines) == 1 and lines[0].startswith("gradient off by nan")
