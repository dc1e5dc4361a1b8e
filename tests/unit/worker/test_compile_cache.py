"""Compiled code that is kept between runs."""

import os
from pathlib import Path

import pytest
import torch

from raytrain_adv.errors import JobError
from raytrain_adv.run.run import local_run
from raytrain_adv.worker.compile_cache import VARIABLE, found_compiled, keep_compiled


@pytest.fixture
def kept(make_job, tmp_path, monkeypatch):
    """Return what runs keep_compiled as on a GPU, and what it said."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(VARIABLE, raising=False)
    job = make_job(torch_compile=True, use_cpu=True)
    run = local_run(job, torch.device("meta"))
    said: list[str] = []
    run.say = said.append
    monkeypatch.setenv(VARIABLE, "")  # so that what is set is undone
    monkeypatch.delenv(VARIABLE)
    return lambda: keep_compiled(job, run), said


def test_compiled_code_is_kept_in_a_folder_of_the_user_alone(kept, tmp_path):
    keep, said = kept
    keep()
    folder = Path(os.environ[VARIABLE])
    assert folder == tmp_path / "cache/raytrain_adv/compiled"
    assert folder.stat().st_mode & 0o777 == 0o700 and not said


def test_a_folder_that_the_variable_names_is_taken(kept, monkeypatch):
    monkeypatch.setenv(VARIABLE, "/scratch/compiled")
    kept[0]()
    assert os.environ[VARIABLE] == "/scratch/compiled"


def test_a_folder_that_others_can_write_is_refused(kept, tmp_path):
    folder = tmp_path / "cache/raytrain_adv/compiled"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(JobError, match="others can write") as error:
        kept[0]()
    assert f"{folder}: owner" in error.value.found and "chmod 700" in error.value.fix


def test_a_folder_that_cannot_be_made_is_said(kept, tmp_path):
    (tmp_path / "cache").write_text("")
    keep, said = kept
    keep()
    assert VARIABLE not in os.environ and "compiled code is kept in" in said[0]


def test_a_folder_that_cannot_be_written_is_said(kept, tmp_path, monkeypatch):
    """A home that is mounted read-only, or whose quota is used up."""

    def refuse(*_, **where):
        raise OSError(30, "Read-only file system", str(where["dir"]))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    keep, said = kept
    keep()
    assert VARIABLE not in os.environ and "Read-only file system" in said[0]


def test_the_second_run_finds_what_the_first_compiled(make_job, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    job = make_job(torch_compile=True, use_cpu=True)
    run = local_run(job, torch.device("cpu"))
    found = []
    for _ in range(2):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch._dynamo.utils.cumulative_time_spent_ns.clear()
        torch.compile(lambda x: (x.sin() * 3).sum())(torch.ones(7))
        found.append(found_compiled(job, run))
    assert found[0].startswith("0 of 1 graphs from earlier runs, ")
    assert found[1].startswith("1 of 1 graphs from earlier runs, ")
    assert found[1].endswith(f"kept in {tmp_path}")
