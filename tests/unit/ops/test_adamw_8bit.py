"""AdamW with 8-bit states over several ranks, where a state is a view of a rank's part."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from raytrain_adv.ops.adamw_8bit import adamw_8bit
from tests.ranks import run_ranks

SIZE = 256


def trained(dtype, ranks=None):
    torch.manual_seed(0)
    layer = nn.Linear(SIZE, SIZE, bias=False, dtype=dtype)
    x = torch.randn(8, SIZE, dtype=dtype)
    if ranks:
        fully_shard(layer, mesh=init_device_mesh("cpu", (ranks,)))
    optimizer = adamw_8bit(layer.parameters(), lr=1e-2)
    for _ in range(2):
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state[layer.weight]["exp_avg"]
    assert state.dtype == dtype
    weight = layer.weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


@pytest.mark.slow  # torchao's step compiles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_two_ranks_train_what_one_does(dtype, tmp_path):
    alone = trained(dtype)
    for weight in run_ranks(trained, 2, tmp_path, dtype, 2):
        torch.testing.assert_close(weight, alone, rtol=1e-2, atol=1e-4)
