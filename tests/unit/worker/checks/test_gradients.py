"""The gate after the first backward pass: all ranks name what has no usable gradient."""

import pickle

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from raytrain_adv.errors import TrainingError
from raytrain_adv.run.run import Run, SilentReporter
from raytrain_adv.storage.storage import Storage
from raytrain_adv.worker.checks.step import require_all_gradients
from tests.ranks import run_ranks


class Two(nn.Module):
    """Two linears, of which the second's gradient may be cut or broken."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, how: str) -> torch.Tensor:
        y = self.second(x)
        if how == "cut":
            y = y.detach()
        return self.first(x) + (y * float("inf") if how == "broken" else y)


def run_on(device: str = "cpu") -> Run:
    storage = Storage.at("/tmp/nowhere")
    return Run(torch.device(device), storage, attempt="local", reporter=SilentReporter())


def passed(how: str) -> Two:
    model = Two()
    model(torch.ones(2, 6), how).sum().backward()
    return model


def test_usable_gradients_pass_the_gate():
    require_all_gradients(passed("whole"), run_on())


def test_a_frozen_parameter_needs_none():
    model = passed("cut")
    model.second.requires_grad_(False)
    require_all_gradients(model, run_on())


@pytest.mark.parametrize(
    ("how", "found"),
    [
        ("cut", "no gradient: second.weight\nno gradient: second.bias"),
        ("broken", "not finite: second.weight\nnot finite: second.bias"),
    ],
)
def test_what_has_no_usable_gradient_is_named(how, found):
    with pytest.raises(TrainingError) as error:
        require_all_gradients(passed(how), run_on())
    assert error.value.found.startswith(found)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def gate(cut_on: int) -> str:
    """Cut the second linear's gradient on one rank; return what this rank says."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    model = passed("cut" if rank == cut_on else "whole")
    try:
        require_all_gradients(model, run_on())
    except TrainingError as error:
        return error.found
    return ""


def sharded(how: str) -> str:
    """Shard the model; return what this rank says."""
    torch.manual_seed(0)
    model = fully_shard(Two(), mesh=init_device_mesh("cpu", (2,)))
    if how == "broken":
        # Row 5 of 6 is the second rank's: the first sees nothing of it.
        gradient = torch.zeros(6, 6)
        gradient[5] = float("inf")
        model(torch.ones(2, 6), "whole").sum().backward()
        part = model.second.weight.grad.to_local()
        part.copy_(gradient[3 * torch.distributed.get_rank() :][: len(part)])
    else:
        model(torch.ones(2, 6), how).sum().backward()
    try:
        require_all_gradients(model, run_on())
    except TrainingError as error:
        return error.found
    return ""


def test_every_rank_names_what_one_rank_lacks(tmp_path):
    for found in run_ranks(gate, 2, tmp_path, 1):
        assert "no gradient: second.weight" in found


@pytest.mark.parametrize(("how", "word"), [("cut", "no gradient"), ("broken", "not finite")])
def test_every_rank_names_the_parameters_of_a_sharded_model(how, word, tmp_path):
    for found in run_ranks(sharded, 2, tmp_path, how):
        assert f"{word}: second.weight" in found
