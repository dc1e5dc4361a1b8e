"""Families against features, as docs/families.json has them: a sample, and in slow tests all."""

import json

import pytest
import transformers

from tests.family_runs import RESULTS, all_families, apart

STORED = json.loads(RESULTS.read_text())
SAMPLE = {"llama": ("full", "export", "LoRA"), "mixtral": ("full", "QAT int8")}


@pytest.mark.parametrize(("kind", "features"), SAMPLE.items())
def test_a_sample_is_right(kind, features):
    assert apart(kind, features) == dict.fromkeys(features, "right")


def test_the_table_has_the_families_of_the_installed_library():
    assert STORED["transformers"] == transformers.__version__
    assert set(STORED["families"]) == set(all_families())


@pytest.mark.slow
@pytest.mark.parametrize("kind", all_families())
def test_a_family_is_as_the_table_has_it(kind):
    wanted = STORED["families"][kind]
    found = apart(kind, tuple(wanted)) if wanted else {}
    if missing := [text for text in found.values() if "ImportError" in text or "NotFound" in text]:
        pytest.skip(missing[0])  # a package that no other test needs
    words = ({f: text.partition(":")[0] for f, text in r.items()} for r in (found, wanted))
    assert next(words) == next(words)
