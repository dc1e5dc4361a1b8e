"""The compatibility matrix, cell by cell: a tiny model on two workers over gloo, under FSDP2."""

import pytest

from raytrain_adv.config import compatibility
from tests.kernel_folders import write_kernel
from tests.matrix_runs import FEATURES, UNSHARDED, Runs, losses_of, numbers, require_loads

CELLS = [cell for cell in compatibility.cells() if cell.test == compatibility.TRAINED]
ON_CPU = [slug for slug, feature in FEATURES.items() if not feature.kind.needs_gpu]
ROUNDING = frozenset({"fp8", "qat", "qlora"})
EXACT = '''
import torch
from torch import nn


class RMSNorm(nn.Module):
    """Off by a few roundings of float32, so that its numbers are not PyTorch's."""
    weight: torch.Tensor
    variance_epsilon: float
    can_torch_compile = True

    def forward(self, hidden_states):
        x = hidden_states.double()
        norm = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (norm * self.weight.double() * (1 + 5e-7)).to(hidden_states.dtype)


class SwiGLUMLP(nn.Module):
    """In float64 between the linears, which it calls."""
    can_torch_compile = True

    def forward(self, x):
        gate = self.gate_proj(x)
        between = nn.functional.silu(gate.double()) * self.up_proj(x).double()
        return self.down_proj(between.to(gate.dtype))
'''


PAIRS = [cell for cell in CELLS if len({one.slug for one in cell.features} - {"fsdp"}) == 2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix")
    kernel = write_kernel(folder / "kernel", EXACT)
    instead = {"hf_kernels": {"use_kernels": True, "kernel_name": str(kernel)}}
    return Runs(folder, 2, {}, instead)


def close(losses, share=0.1):
    return pytest.approx(losses, rel=share)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.slug)
def test_it_trains_by_its_numbers_resumes_and_exports(runs, cell):
    """Alone: its numbers are not the plain run's. With FSDP: sharding changes none of its numbers.
    Two: neither's numbers are those without it, a resumed run goes on to the bit.
    """
    slugs = tuple(one.slug for one in cell.features)
    if "fsdp" in slugs:
        others = [slug for slug in slugs if slug != "fsdp"]
        sharded = runs.with_features(*others)
        whole = runs.with_features(*others, **UNSHARDED)
        # Sums in another order flip some roundings of features that round.
        rounds = ROUNDING.intersection(others)
        assert losses_of(sharded) == close(losses_of(whole), 1e-3 if rounds else 1e-4)
        require_loads(sharded)
        return
    if len(slugs) == 1:
        alone = runs.with_features(*slugs, **UNSHARDED)
        runs.require_on(slugs[0], alone, runs.with_features(**UNSHARDED))
        assert losses_of(alone) == close(losses_of(runs.with_features()))
        return
    before, after = runs.resumed(*slugs)
    assert after == before
    both = runs.done["+".join(slugs)]
    for slug in slugs:
        (other,) = (one for one in slugs if one != slug)
        if not runs.is_part(slug, slugs):
            runs.require_on(slug, both, runs.with_features(other))
    assert losses_of(both) == close(losses_of(runs.with_features()))
    require_loads(both)


def going_together(precision):
    def fits(slug):
        cell = compatibility.cell_of(FEATURES[precision], FEATURES[slug])
        return slug == precision or (cell.verdict == "yes" and slug != "fsdp")

    return tuple(slug for slug in ON_CPU if fits(slug))


@pytest.mark.parametrize("precision", ["fp8", pytest.param("qat", marks=pytest.mark.slow)])
def test_all_that_goes_together_is_on_at_once(runs, precision):
    slugs = going_together(precision)
    before, after = runs.resumed(*slugs)
    assert after == before
    every = runs.done["+".join(slugs)]
    for slug in slugs:
        rest = runs.with_features(*(one for one in slugs if one != slug))
        if not runs.is_part(slug, slugs):
            runs.require_on(slug, every, rest)
    require_loads(every)


@pytest.mark.slow
def test_fp8_kernels_and_compile_go_together(runs):
    """What the compiled layers compute in FP8 with kernels is what they compute uncompiled."""
    eager = runs.with_features("fp8", "hf_kernels")
    compiled = runs.with_features("fp8", "hf_kernels", torch_compile=True)
    assert losses_of(compiled) == close(losses_of(eager), 5e-3)
    assert numbers(compiled) != numbers(runs.with_features("hf_kernels"))
    assert numbers(compiled) != numbers(eager)
    require_loads(compiled)


@pytest.mark.slow
@pytest.mark.parametrize("cell", PAIRS, ids=lambda cell: cell.slug)
def test_a_pair_compiles_to_what_it_is_uncompiled(runs, cell):
    """Both features are on by their numbers under torch_compile, and a resumed run goes on to the
    bit.
    """
    require_compiles(runs, tuple(one.slug for one in cell.features))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp8", "qat"])
def test_all_that_goes_together_compiles(runs, precision):
    require_compiles(runs, going_together(precision))


def require_compiles(runs, slugs):
    before, after = runs.resumed(*slugs, torch_compile=True)
    assert after == before
    every = runs.done["+".join([*slugs, "torch_compile"])]
    assert losses_of(every) == close(losses_of(runs.with_features(*slugs)), 5e-3)
    for slug in slugs:
        rest = runs.with_features(*(one for one in slugs if one != slug), torch_compile=True)
        if not runs.is_part(slug, slugs):
            runs.require_on(slug, every, rest)
    require_loads(every)
