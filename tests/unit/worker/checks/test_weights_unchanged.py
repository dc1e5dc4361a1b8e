"""A pass that writes over weights stops the run, and names them on all ranks."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from raytrain_adv.errors import TrainingError
from raytrain_adv.ops.float8.all_gather import GatheredInFloat8, Scale
from raytrain_adv.worker.checks.step import bits_of, require_kept
from tests.ranks import run_ranks
from tests.unit.worker.checks.test_gradients import run_on


def model_of(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_smallest_change_of_one_number_is_found(dtype):
    model = model_of(dtype)
    before = bits_of(model)
    require_kept(model, before, run_on())
    with torch.no_grad():
        weight = model[1].weight
        weight[3, 2] = torch.nextafter(weight[3, 2], torch.tensor(9.0, dtype=dtype))
    with pytest.raises(TrainingError, match=r"1\.weight\n\s+\(1 of 4 parameters") as error:
        require_kept(model, before, run_on())
    assert "torch_compile: false" in str(error.value)


def test_a_pass_changes_nothing_and_the_optimizer_does():
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    before = bits_of(model)
    model(torch.ones(2, 6)).sum().backward()
    require_kept(model, before, run_on())
    optimizer.step()
    with pytest.raises(TrainingError, match="4 of 4"):
        require_kept(model, before, run_on())


def test_a_frozen_weight_counts():
    model = model_of().requires_grad_(False)
    before = bits_of(model)
    model[0].bias.data[0] += 1
    with pytest.raises(TrainingError, match=r"0\.bias"):
        require_kept(model, before, run_on())


def test_tensors_made_of_others_and_of_bytes_are_read_too():
    model = nn.Module()
    model.cast = nn.Parameter(GatheredInFloat8(torch.ones(4, 4), Scale()))
    model.packed = nn.Parameter(torch.ones(8, dtype=torch.uint8), requires_grad=False)
    before = bits_of(model)
    model.packed.data[0] = 2
    model.cast.plain[0, 0] = 2
    with pytest.raises(TrainingError, match="2 of 2"):
        require_kept(model, before, run_on())


def kept_on_a_rank():
    """Return what this rank says of a weight that changed on the second."""
    mesh = init_device_mesh("cpu", (2,))
    model = model_of()
    for module in (*model, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
    with torch.no_grad():
        model(torch.ones(2, 6))  # as an evaluation, which leaves the whole weights there
    before = bits_of(model)
    model(torch.ones(2, 6)).sum().backward()
    require_kept(model, before, run_on())
    if torch.distributed.get_rank() == 1:
        model[0].weight.data.to_local()[0, 0] += 1
    try:
        require_kept(model, before, run_on())
    except TrainingError as error:
        return error.found
    return ""


def test_what_changed_on_one_rank_stops_all(tmp_path):
    first, second = run_ranks(kept_on_a_rank, 2, tmp_path)
    assert first == second and first.startswith("0.weight\n(1 of 4")
