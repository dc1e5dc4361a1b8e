"""Copies for checkpoints on a GPU: in page-locked memory, the same for every checkpoint."""

import pytest
import torch

from raytrain_adv.checkpoint.staging import HostMemory, stage, tensors_of
from tests import workers
from tests.matrix_runs import Runs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def state_of(seed):
    torch.manual_seed(seed)
    large = torch.randn(1500, 1111, device="cuda", dtype=torch.bfloat16)
    moments = [torch.randn(777, 1234, device="cuda"), torch.zeros((), device="cuda")]
    return {"model": {"large": large, "small": torch.randn(7, device="cuda")}, "moments": moments}


def equal(copies, state):
    pairs = zip(tensors_of(copies), tensors_of(state), strict=True)
    return all(a == b and torch.equal(x, y.cpu()) for (a, x), (b, y) in pairs)


def test_copies_are_exact_and_large_ones_lie_in_the_same_locked_memory():
    said = []
    memory = HostMemory(said.append)
    first, second = state_of(0), state_of(1)
    memory.prepare(tensors_of(first))
    copies = stage(first, memory)
    assert equal(copies, first)
    places = {path: tensor.data_ptr() for path, tensor in tensors_of(copies)}
    locked = {pages.data_ptr() for pages in memory.locked}
    assert locked == {copies["model"]["large"].data_ptr(), copies["moments"][0].data_ptr()}
    again = stage(second, memory)
    assert equal(again, second)
    assert {path: tensor.data_ptr() for path, tensor in tensors_of(again)} == places
    memory.release()
    assert memory.locked == [] and said == []


def test_a_state_without_memory_of_its_own_is_copied_all_the_same():
    state = state_of(0)
    assert equal(stage(state, HostMemory(print)), state)


def test_a_node_without_the_memory_is_told_of(monkeypatch):
    monkeypatch.setattr("raytrain_adv.checkpoint.staging.free_host_memory", lambda: 2**20)
    said, state = [], state_of(0)
    memory = HostMemory(said.append)
    memory.prepare(tensors_of(state))
    assert equal(stage(state, memory), state)
    assert "not page-locked" in said[0] and "steps wait longer" in said[0]
    memory.release()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_shards_of_two_gpus_are_copied_to_locked_memory_and_a_run_resumes_from_them(
    tmp_path,
):
    """Training goes on while its checkpoint is written: of another moment's state the resumed step
    would be another one."""
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 128}
    runs = Runs(tmp_path, 2, {"bf16": True}, shape=wide)
    before, after = runs.resumed("fp8")
    assert after.keys() == before.keys()
    for step, (loss, norm) in before.items():
        assert after[step] == (pytest.approx(loss, rel=1e-3), pytest.approx(norm, rel=1e-2))
    output = [rank.log.read_text() for rank in workers.group(2)]
    assert not any("not page-locked" in text for text in output), output
