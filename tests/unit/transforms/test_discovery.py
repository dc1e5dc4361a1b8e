"""A transform is found by its file, and counted once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from raytrain_adv import transforms
from raytrain_adv.transforms import Transform, discover
from raytrain_adv.transforms.lora import Lora

MODULE = """
from typing import ClassVar

from raytrain_adv.transforms.lora import Lora
from raytrain_adv.transforms.transform import Transform

Again = Lora


class Own(Transform):
    name: ClassVar[str] = "own"
    stage: ClassVar[str] = "loss"


class Deeper(Lora):
    name: ClassVar[str] = "deeper"
"""


@pytest.fixture
def borrower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put a module that imports another transform beside the package's own."""
    (tmp_path / "borrower.py").write_text(MODULE)
    monkeypatch.setattr(transforms, "__path__", [*transforms.__path__, str(tmp_path)])
    discover.cache_clear()
    yield
    discover.cache_clear()
    sys.modules.pop("raytrain_adv.transforms.borrower", None)
    vars(transforms).pop("borrower", None)


@pytest.mark.usefixtures("borrower")
def test_an_imported_transform_is_counted_once_and_own_ones_are_all_found() -> None:
    names = [kind.name for kind in discover()]
    assert [names.count(name) for name in ("deeper", "lora", "own")] == [1, 1, 1]
    assert len(names) == len(set(names))


def test_a_transform_defined_outside_the_package_is_not_one_of_its() -> None:
    class Stranger(Transform):
        name: ClassVar[str] = "stranger"
        stage: ClassVar[str] = "loss"

    assert Stranger not in discover()
    assert Lora in discover()


def test_a_feature_has_few_hooks_to_know() -> None:
    hooks = [
        name for name, value in vars(Transform).items() if callable(value) or is_property(value)
    ]
    own = {name for name in hooks if not name.startswith("_") and name != "model_post_init"}
    assert own == {
        *("enabled", "check", "fetch", "plan", "prepare", "what_is", "install", "before_sharding"),
        *("gathering", "initialize", "is_on", "begin_batch", "after_step"),
    }


def is_property(value: object) -> bool:
    return isinstance(value, property)
