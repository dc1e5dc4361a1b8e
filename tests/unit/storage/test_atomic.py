"""Files and folders are there whole or not at all."""

import os

import pytest

from raytrain_adv.storage.atomic import atomic_folder, write_atomic


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file"
    write_atomic(path, "old \ud800")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_atomic(path, b"new")
    assert path.read_text() == "old \\ud800"


def test_a_folder_that_fails_leaves_the_old_folder_and_nothing_else(tmp_path):
    path = tmp_path / "folder"
    with atomic_folder(path) as partial:
        (partial / "a").write_text("1")
    with pytest.raises(ZeroDivisionError), atomic_folder(path) as partial:
        (partial / "a").write_text("2")
        raise ZeroDivisionError
    assert (path / "a").read_text() == "1" and [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_folder_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "folder"
    for name in "ab":
        with atomic_folder(path) as partial:
            (partial / name).write_text(name)
    assert [p.name for p in path.iterdir()] == ["b"] and [p.name for p in tmp_path.iterdir()] == [
        "folder"
    ]
