"""A feature is one file, with its rules and ops: few other files name it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3] / "raytrain_adv"
MOST = {"fp8": 4, "qat": 4, "quantiz": 4}
"""Of quantiz: the command `export`, the keys of the two records, and the metric of sweeps."""
OWN = {
    "fp8": ("transforms/fp8.py", "transforms/quantized_base.py", "transforms/qat_rules.py", "ops/"),
    "qat": ("transforms/qat", "ops/"),
    "quantiz": ("transforms/qat", "transforms/quantized_base.py", "ops/"),
}


@pytest.mark.parametrize("word", OWN)
def test_a_feature_is_named_in_few_files_besides_its_own(word):
    named = [
        path
        for file in sorted(ROOT.rglob("*.py"))
        if not (path := file.relative_to(ROOT).as_posix()).startswith(OWN[word])
        and re.search(word, file.read_text(), re.IGNORECASE)
    ]
    assert len(named) <= MOST[word], named
