"""A checkpoint is data: files that would run code as they are read are refused, and do not run."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_as_torch_does
from torch.distributed.checkpoint.state_dict_saver import save

from raytrain_adv.checkpoint.load import read_state
from raytrain_adv.errors import StorageError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


def state(values: float) -> dict[str, Any]:
    """As of a model and its optimizer: tensors, and values that are none."""
    tensors = {"w": torch.full((4, 3), values), "half": torch.full((5,), values).bfloat16()}
    groups = {"lr": values, "betas": (0.9, values), "fused": None, "params": ["w"]}
    return {"model": tensors, "optimizer": {"step": torch.tensor(values), "groups": groups}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(state(2.0), checkpoint_id=tmp_path / "step", no_dist=True)
    return tmp_path / "step"


def read(folder: Path) -> dict[str, Any]:
    found = state(0.0)
    read_state(found, str(folder), str(folder))
    return found


def refusal(folder: Path) -> str:
    with pytest.raises(StorageError) as error:
        read(folder)
    return str(error.value)


def test_what_was_written_is_read(folder):
    found, written = read(folder), state(2.0)
    assert all(torch.equal(found["model"][k], v) for k, v in written["model"].items())
    assert found["optimizer"]["groups"] == written["optimizer"]["groups"]
    assert float(found["optimizer"]["step"]) == 2.0


def test_metadata_that_would_run_code_is_refused_and_does_not(folder, tmp_path):
    found = FileSystemReader(folder).read_metadata()
    found.planner_data = Evil(tmp_path / "ran")
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    message = refusal(folder)
    assert "contains more than data" in message and "mkdir" in message and ".metadata" in message
    assert "fix:" in message
    assert not (tmp_path / "ran").exists()
    load_as_torch_does(state(0.0), checkpoint_id=folder, no_dist=True)
    assert (tmp_path / "ran").exists(), "the file was harmless: this test shows nothing"


@pytest.mark.parametrize("name", ["os.system", "Size.__class__", "serialization.os.system", "load"])
def test_torch_is_no_way_to_other_functions(folder, name):
    """A pickle's names may have dots: they lead from a module to what it imports."""
    module, text = b"torch", name.encode()
    pickled = b"\x80\x04\x8c" + bytes([len(module)]) + module
    pickled += b"\x8c" + bytes([len(text)]) + text + b"\x93."
    (folder / ".metadata").write_bytes(pickled)
    assert f"torch.{name}" in refusal(folder)


def test_an_optimizer_value_that_would_run_code_is_refused_and_does_not(tmp_path):
    evil = state(2.0)
    evil["optimizer"]["groups"]["lr"] = Evil(tmp_path / "ran")
    save(evil, checkpoint_id=tmp_path / "step", no_dist=True)
    assert "contains more than data" in refusal(tmp_path / "step")
    assert not (tmp_path / "ran").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_as_torch_does(state(0.0), checkpoint_id=tmp_path / "step", no_dist=True)
    assert (tmp_path / "ran").exists(), "the file was harmless: this test shows nothing"


def test_a_tensor_s_shard_that_would_run_code_is_refused_and_does_not(folder, tmp_path):
    """In place of a tensor stands a file of torch.save that holds something else."""
    found = FileSystemReader(folder).read_metadata()
    torch.save(Evil(tmp_path / "ran"), folder / "evil.distcp")
    for info in found.storage_data.values():
        info.relative_path, info.offset = "evil.distcp", 0
        info.length = (folder / "evil.distcp").stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    assert "contains more than data" in refusal(folder)
    assert not (tmp_path / "ran").exists()


def test_a_shard_elsewhere_is_not_read(folder):
    found = FileSystemReader(folder).read_metadata()
    next(iter(found.storage_data.values())).relative_path = "../other/__0_0.distcp"
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    assert "../other/__0_0.distcp, which is in another folder" in refusal(folder)


def test_metadata_without_the_name_of_a_file_is_damaged(folder):
    """An object that is unpickled may lack any attribute: AttributeError came out of it."""
    found = FileSystemReader(folder).read_metadata()
    del next(iter(found.storage_data.values())).__dict__["relative_path"]
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    assert "it names no file for a tensor" in refusal(folder)
    # 2**62 bytes that are not there: pickle takes the memory first.
    (folder / ".metadata").write_bytes(b"\x80\x04\x8e" + (2**62).to_bytes(8, "little"))
    assert "cannot be read" in refusal(folder)


def test_damaged_files_are_storage_errors(folder):
    shard = next(folder.glob("*.distcp"))
    whole = shard.read_bytes()
    shard.write_bytes(b"\0" * len(whole))
    assert "cannot be read" in refusal(folder) or "more than data" in refusal(folder)
    shard.unlink()
    assert "cannot be read" in refusal(folder)
    for content in (b"", b"garbage", pickle.dumps({"a": 1}), pickle.dumps("text")[:-4]):
        (folder / ".metadata").write_bytes(content)
        message = refusal(folder)
        assert "cannot be read" in message and "resume" in message
