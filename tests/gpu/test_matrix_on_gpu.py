"""The compatibility matrix on one GPU and, where there are two, over both: bf16, FSDP2, NCCL, with
Liger's cells.
"""

import os

import pytest
import torch

from raytrain_adv.config import compatibility
from tests import workers
from tests.matrix_runs import FEATURES, Runs, losses_of, numbers, require_loads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
CELLS = [cell for cell in compatibility.cells() if cell.verdict != "no"]
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


@pytest.fixture(scope="module", params=[1, 2], ids=["one GPU", "two GPUs"])
def runs(request, tmp_path_factory):
    """Runs in processes that torchrun would have started, each with a GPU."""
    gpus = request.param
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    workers.stop(gpus)
    before = dict(os.environ)
    if gpus == 1:
        os.environ |= ALONE
    wide = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    wide |= {"num_hidden_layers": 2}
    yield Runs(tmp_path_factory.mktemp("matrix"), gpus, {"bf16": True}, shape=wide)
    workers.stop(gpus)
    os.environ.clear()
    os.environ |= before


def close(losses, share=0.1):
    return pytest.approx(losses, rel=share)


@pytest.mark.parametrize("slugs", [(), ("fp8",), ("qat",)], ids=["plain", "fp8", "qat"])
def test_equal_runs_have_equal_numbers(runs, slugs):
    """What the tests below take for granted: a difference is a feature's."""
    again = runs.with_features(*slugs, ddp_timeout=1200)
    assert numbers(again) == numbers(runs.with_features(*slugs))


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.slug)
def test_it_trains_by_its_numbers_on_a_gpu(runs, cell):
    """Each feature changes the numbers of a run with the other, the run resumes and exports."""
    slugs = tuple(one.slug for one in cell.features if one.slug != "fsdp")
    if len(slugs) < 2:
        alone = runs.with_features(*slugs)
        if slugs:
            assert numbers(alone) != numbers(runs.with_features())
        assert losses_of(alone) == close(losses_of(runs.with_features()))
        require_loads(alone)
        return
    before, after = runs.resumed(*slugs)
    assert after.keys() == before.keys()
    for step, (loss, norm) in before.items():
        assert after[step] == (close(loss, 1e-3), close(norm, 1e-2))
    both = runs.done["+".join(slugs)]
    for slug in slugs:
        (other,) = (one for one in slugs if one != slug)
        if not runs.is_part(slug, slugs):
            # `before`, and not the resumed run: its last step may differ, done again.
            assert before != numbers(runs.with_features(other)), f"{slug} is off"
    assert losses_of(both) == close(losses_of(runs.with_features()))
    require_loads(both)


@pytest.mark.parametrize("first", ["fp8", "qat", "lora+fp8", "lora+qat"])
def test_what_the_documentation_recommends_compiles(runs, first):
    """FP8 with kernels under torch_compile, and QAT with kernels; with adapters too."""
    slugs = (*first.split("+"), "hf_kernels")
    eager = runs.with_features(*slugs)
    compiled = runs.with_features(*slugs, torch_compile=True)
    assert losses_of(compiled) == close(losses_of(eager), 2e-2)
    rest = runs.with_features("hf_kernels", torch_compile=True)
    assert numbers(compiled) != numbers(rest), f"{first} is off"
    require_loads(compiled)


def test_every_feature_is_tried() -> None:
    assert {one.slug for cell in CELLS for one in cell.features} == set(FEATURES)
