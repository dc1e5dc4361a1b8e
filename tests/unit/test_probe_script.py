"""What the probe of a node reads without importing the package."""

import shutil
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

import raytrain_adv
from raytrain_adv import probe_script

PACKAGE = Path(raytrain_adv.__file__).parent
SAVED = shutil.ignore_patterns("__pycache__")  # where other processes write and rename files


@pytest.fixture
def copy(tmp_path, monkeypatch):
    shutil.copytree(PACKAGE, tmp_path / "raytrain_adv", ignore=SAVED)
    found = tmp_path / "raytrain_adv" / "__init__.py"
    monkeypatch.setattr(probe_script, "origin", lambda package: found)
    return found.parent


@pytest.mark.parametrize(
    "suffix", sorted({p.suffix for _, p in probe_script.package_files(PACKAGE)})
)
def test_the_hash_notices_a_change_of_every_kind_of_file(copy, suffix):
    before = probe_script.own_package()
    changed = next(copy.rglob(f"*{suffix}"))
    changed.write_text(changed.read_text() + "\n")
    after = probe_script.own_package()
    assert before[0] == after[0] == raytrain_adv.__version__
    assert before[1] != after[1]


@pytest.mark.parametrize("left", ["__pycache__/cli.pyc", ".DS_Store", "cli.py~", "cli.py.orig"])
def test_the_hash_is_not_of_what_tools_leave(copy, left):
    before = probe_script.own_package()
    (copy / left).parent.mkdir(exist_ok=True)
    (copy / left).write_text("x")
    assert probe_script.own_package() == before


def test_every_hashed_file_is_installed():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    globs = ["*.py"]
    for package, names in project["tool"]["setuptools"]["package-data"].items():
        folder = package.removeprefix("raytrain_adv").replace(".", "/").lstrip("/")
        globs += [f"{folder}/{name}".lstrip("/") for name in names]
    names = [name for name, _ in probe_script.package_files(PACKAGE)]
    assert [name for name in names if not any(fnmatch(name, one) for one in globs)] == []
