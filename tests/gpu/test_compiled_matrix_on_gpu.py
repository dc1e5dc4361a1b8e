"""The compatibility matrix under torch_compile on one GPU: each pair computes what it computes
uncompiled, both features are on by their numbers, and a resumed run goes on.

Minutes of compilation: in parts with -k, each in a process of its own, they take a few together.
"""

import pytest
import torch

from tests.gpu.test_matrix_on_gpu import CELLS, close, runs  # noqa: F401 # a fixture
from tests.matrix_runs import losses_of, numbers, require_loads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.parametrize("runs", [1], indirect=True, ids=["one GPU"], scope="module"),
]
PAIRS = [cell for cell in CELLS if len({one.slug for one in cell.features} - {"fsdp"}) == 2]


@pytest.mark.parametrize("slugs", [(), ("qat",), ("fp8",)], ids=["plain", "qat", "fp8"])
def test_equal_runs_have_equal_numbers(runs, slugs):  # noqa: F811 # the fixture
    """What the tests below take for granted: a difference is a feature's."""
    again = runs.with_features(*slugs, torch_compile=True, ddp_timeout=1200)
    assert numbers(again) == numbers(runs.with_features(*slugs, torch_compile=True))


@pytest.mark.parametrize("cell", PAIRS, ids=lambda cell: cell.slug)
def test_a_pair_compiles_to_what_it_is_uncompiled(runs, cell):  # noqa: F811 # the fixture
    slugs = tuple(one.slug for one in cell.features)
    before, after = runs.resumed(*slugs, torch_compile=True)
    assert after.keys() == before.keys()
    for step, (loss, norm) in before.items():
        assert after[step] == (close(loss, 1e-3), close(norm, 1e-2))
    both = runs.done["+".join([*slugs, "torch_compile"])]
    assert losses_of(both) == close(losses_of(runs.with_features(*slugs)), 2e-2)
    # `before`, and not the resumed run: its last step may differ, done again.
    for slug in slugs:
        (other,) = (one for one in slugs if one != slug)
        if not runs.is_part(slug, slugs):
            rest = runs.with_features(other, torch_compile=True)
            assert before != numbers(rest), f"{slug} is off"
    require_loads(both)
