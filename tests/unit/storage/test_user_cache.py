"""Bytecode that is kept where an image has none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
from raytrain_adv.storage.user_cache import keep_bytecode
said = keep_bytecode()
import torch
print(json.dumps([said, torch.__cached__]))
"""


@pytest.fixture
def start(tmp_path: Path):
    """Return what starts a process with a torch of one file, and gives what it said and the
    bytecode's file.
    """
    package = tmp_path / "site" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    cache = tmp_path / "cache"
    paths = os.pathsep.join([str(package.parent), str(Path(__file__).parents[3])])

    def run(**variables: str) -> tuple[str, Path]:
        unset = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": ""}
        environment = {**os.environ, **unset, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": paths}
        environment |= variables
        command = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said, cached = json.loads(done.stdout)
        return said, Path(cached)

    return run


def test_a_second_start_finds_what_the_first_compiled(start, tmp_path):
    kept = tmp_path / "cache/raytrain_adv/bytecode"
    for _ in range(2):
        said, cached = start(PYTHONDONTWRITEBYTECODE="1")
        assert str(kept) in said and cached.is_relative_to(kept) and cached.is_file()
    assert kept.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("variables", [{}, {"PYTHONDONTWRITEBYTECODE": "1"}])
def test_a_torch_with_bytecode_stays_as_it_is(start, variables, tmp_path):
    start()
    said, cached = start(**variables)
    assert not said and cached.is_file() and not (tmp_path / "cache").exists()


def test_a_folder_that_the_variable_names_is_taken(start, tmp_path):
    own = tmp_path / "own"
    said, cached = start(PYTHONDONTWRITEBYTECODE="1", PYTHONPYCACHEPREFIX=str(own))
    assert not said and cached.is_relative_to(own)


def test_a_folder_that_cannot_be_made_is_said(start, tmp_path):
    (tmp_path / "cache").write_text("")
    said, cached = start(PYTHONDONTWRITEBYTECODE="1")
    assert "no bytecode is kept" in said and not cached.exists()
