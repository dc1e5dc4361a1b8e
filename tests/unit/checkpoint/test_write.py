"""A checkpoint's files, written in threads."""

import resource
import zlib

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from raytrain_adv.checkpoint import write
from raytrain_adv.checkpoint.write import Writer


@pytest.fixture
def state(monkeypatch):
    """Return a state that is written in three files."""
    monkeypatch.setattr(write, "num_threads", lambda: 3)
    monkeypatch.setattr(write, "SMALLEST_FILE", 2**20)
    monkeypatch.setattr(write, "FLUSHED", 2**20)
    torch.manual_seed(0)
    tensors = {f"layer{n}": torch.randn(3 * 2**17 + n) for n in range(7)}
    return {"model": tensors, "optimizer": {"step": 7, "exp_avg": torch.randn(5).bfloat16()}}


def test_checksums_are_those_of_the_files(state, tmp_path):
    writer = Writer(str(tmp_path), state)
    save(state, storage_writer=writer, no_dist=True)
    files = {path.name: zlib.crc32(path.read_bytes()) for path in tmp_path.iterdir()}
    assert writer.crc32 == files
    assert sorted(files) == [".metadata", "__0_0.distcp", "__0_1.distcp", "__0_2.distcp"]


def test_what_threads_wrote_is_read_by_dcp(state, tmp_path):
    save(state, storage_writer=Writer(str(tmp_path), state), no_dist=True)
    read = {
        "model": {name: torch.zeros_like(value) for name, value in state["model"].items()},
        "optimizer": {"step": 0, "exp_avg": torch.zeros(5).bfloat16()},
    }
    load(read, checkpoint_id=str(tmp_path), no_dist=True)
    assert all(torch.equal(read["model"][name], t) for name, t in state["model"].items())
    assert read["optimizer"]["step"] == 7
    assert torch.equal(read["optimizer"]["exp_avg"], state["optimizer"]["exp_avg"])


def test_a_thread_that_cannot_write_fails_the_checkpoint(state, tmp_path):
    """In torch's own threads the error is printed, and the checkpoint lacks the tensors."""
    (tmp_path / "__0_2.distcp").mkdir()
    with pytest.raises((OSError, CheckpointException), match="Is a directory"):
        save(state, storage_writer=Writer(str(tmp_path), state), no_dist=True)


def test_a_small_checkpoint_is_one_file(tmp_path):
    state = {"model": {f"layer{n}": torch.ones(9) for n in range(9)}}
    save(state, storage_writer=Writer(str(tmp_path), state), no_dist=True)
    assert [path.name for path in tmp_path.glob("*.distcp")] == ["__0_0.distcp"]


def test_a_disk_that_fills_up_in_the_middle_of_a_file_is_called_so(tmp_path):
    """torch's zip writer raises an error of its own at the end, about positions in the file."""
    state = {"model": {"layer": torch.ones(9999)}}
    most, hard = resource.getrlimit(resource.RLIMIT_FSIZE)  # what a full disk does, without one
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises((OSError, CheckpointException), match="File too large"):
            save(state, storage_writer=Writer(str(tmp_path), state), no_dist=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
