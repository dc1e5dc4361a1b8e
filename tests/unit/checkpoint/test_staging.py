"""Checkpoints of torchao's 8-bit optimizer states: what is read is what was written."""

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import load, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torchao.optim.subclass_8bit import OptimState8bit

from raytrain_adv.checkpoint.staging import (
    HostMemory,
    plain_like,
    restore_8bit,
    stage,
    tensors_of,
)
from raytrain_adv.hardware import free_host_memory
from raytrain_adv.ops.pages import PAGE
from tests.ranks import run_ranks


@pytest.mark.parametrize("signed", [True, False])
def test_8bit_states_come_back_with_every_value(signed):
    """Also blocks whose largest magnitude is negative, which torchao's map does not hold."""
    torch.manual_seed(0)
    scales = 10.0 ** torch.empty(4096, 1).uniform_(-14, 2)
    values = torch.randn(4096, 256) * scales
    values[7] = 0.0
    state = OptimState8bit.zeros(values.shape, signed=signed)
    state.copy_(values if signed else values.square())
    written = stage({"exp_avg": state}, HostMemory(print))
    other = OptimState8bit.zeros(values.shape, signed=signed)
    other.copy_(torch.randn(4096, 256).abs())
    read = plain_like({"exp_avg": other})
    read["exp_avg"].copy_(written["exp_avg"])
    assert restore_8bit({"exp_avg": other}, read)
    assert torch.equal(other.dequantize(), state.dequantize())
    has_sign = state.dequantize().abs().amax(-1) > 0
    assert torch.equal(other.codes[has_sign], state.codes[has_sign])
    assert torch.equal(other.scale[has_sign], state.scale[has_sign])


def test_values_cut_into_other_blocks_are_quantized_as_torchao_does():
    state = OptimState8bit.zeros((64, 64), signed=True)
    values = torch.randn(64, 64)
    expected = OptimState8bit.zeros((64, 64), signed=True)
    expected.copy_(values)
    restore_8bit({"exp_avg": state}, {"exp_avg": values})
    assert torch.equal(state.codes, expected.codes) and torch.equal(state.scale, expected.scale)


def test_a_copy_is_apart_from_its_tensor_and_named_by_its_path():
    state = {"model": {"a": torch.ones(3)}, "steps": [torch.zeros(()), 7]}
    copies = stage(state, HostMemory(print))
    state["model"]["a"].zero_()
    assert torch.equal(copies["model"]["a"], torch.ones(3)) and copies["steps"][1] == 7
    assert [path for path, _ in tensors_of(state)] == ["/model/a", "/steps/0"]


def test_memory_that_is_free_is_read_from_the_machine():
    assert 2**20 < free_host_memory() <= 2**62


def copied_on_a_rank(folder):
    """Copy a sharded weight to memory as a GPU's would be, save it; return what was locked."""
    locked = []

    class Runtime:
        def cudaHostRegister(self, address, size, flags):  # CUDA's own name
            assert address % PAGE == 0 and size % PAGE == 0
            locked.append(size)
            return 0

        def cudaHostUnregister(self, address):  # CUDA's own name
            locked.pop()

    torch.cuda.cudart = Runtime
    torch.manual_seed(0)
    model = nn.Linear(999, 1001, bias=False)
    whole = model.weight.detach().clone()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    assert torch.empty_like(model.weight, device="meta").to_local().device.type == "meta"
    memory = HostMemory(print)
    copy = memory._taken(model.weight.detach())
    assert isinstance(copy, DTensor) and copy.shape == whole.shape and locked
    copy.to_local().copy_(model.weight.detach().to_local())
    save({"weight": copy}, checkpoint_id=folder)
    read = {"weight": torch.zeros_like(whole)}
    load(read, checkpoint_id=folder)
    assert torch.equal(read["weight"], whole)
    memory.release()
    return len(locked)


def test_memory_for_a_sharded_tensor_holds_this_ranks_part(tmp_path):
    assert run_ranks(copied_on_a_rank, 2, tmp_path, str(tmp_path / "saved")) == [0, 0]


def test_memory_that_cannot_be_had_is_told_of_and_the_copy_is_made(monkeypatch):
    said = []
    memory = HostMemory(said.append)
    memory.prepare(iter(()))

    def fail(tensor):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(memory, "_taken", fail)
    for path in ("/a", "/b"):
        memory.coming[path] = memory.pool.submit(memory._taken, torch.ones(3))
        assert memory.of(path, torch.ones(3)).shape == (3,)
    assert len(said) == 1 and "can't allocate memory" in said[0]
