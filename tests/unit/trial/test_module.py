"""A replacement forward pass is tried on the module's own numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from raytrain_adv.trial.module import Candidate, try_module


def _fail(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


class Full(nn.Linear):
    """A module for which the device has no room."""

    forward: Any = _fail


@pytest.mark.parametrize("module", [nn.Linear(16, 16), Full(16, 16)])
def test_no_memory_during_a_trial_is_not_taken_for_a_fault_of_the_kernel(module: nn.Linear) -> None:
    candidate = Candidate(
        _fail, "the kernel k", module, "leave it out", torch.device("cpu"), torch.float32
    )
    with pytest.raises(torch.OutOfMemoryError):
        try_module(candidate)
