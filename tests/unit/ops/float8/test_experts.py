"""Grouped products in float8 on a CPU: exactly those of a loop over experts, with any routing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from raytrain_adv.ops.experts.find import stacked
from raytrain_adv.ops.experts.grouped import GroupedExperts
from raytrain_adv.ops.float8 import grouped as operators
from raytrain_adv.ops.float8.experts import Float8Experts, _Product, aligned, distance, speed
from raytrain_adv.ops.float8.row_cast import define, product
from tests.tiny_models import write_checkpoint

WIDTH, OUT = 32, 80
EVEN, UNEVEN = [64, 128, 192], [16, 16, 192]  # UNEVEN leaves the second expert without a row
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 48}


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def one(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left [a, k] @ right [b, k].t() of matrices that are cast row by row."""
    if not left.shape[1]:
        return left.new_zeros(left.shape[0], right.shape[0])
    first, second = (define(matrix.contiguous(), True, False) for matrix in (left, right))
    return product(first, second, left.dtype, fast=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ends", [EVEN, UNEVEN])
def test_products_and_gradients_are_those_of_a_loop_over_experts(
    ends: list[int], transposed: bool, dtype: torch.dtype
) -> None:
    x, pull = numbers(192, WIDTH, dtype=dtype), numbers(192, OUT, seed=1, dtype=dtype)
    weight = numbers(3, *((WIDTH, OUT) if transposed else (OUT, WIDTH)), seed=2, dtype=dtype)
    inputs = (x.requires_grad_(), weight.requires_grad_())
    offs = torch.tensor(ends, dtype=torch.int32)
    value: Any = _Product.apply(*inputs, offs, transposed)
    found = [value.detach(), *torch.autograd.grad(value, inputs, pull)]
    parts = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
    each = [w.detach().mT if transposed else w.detach() for w in weight]  # [out, in]
    gradients = [one(pull[of].t(), x[of].detach().t()) for of in parts]
    expected = [
        torch.cat([one(x[of].detach(), w) for of, w in zip(parts, each, strict=True)]),
        torch.cat([one(pull[of], w.t()) for of, w in zip(parts, each, strict=True)]),
        torch.stack([g.t() if transposed else g for g in gradients]),
    ]
    for ours, right in zip(found, expected, strict=True):
        assert ours.dtype == dtype and ours.any()
        torch.testing.assert_close(
            ours, right, rtol=1e-2 if dtype == torch.bfloat16 else 8e-3, atol=1e-4
        )


def test_pytorch_has_no_grouped_product_on_a_cpu_but_ours() -> None:
    """Remove _on_cpu when it has."""
    assert hasattr(operators, "_LIBRARY")


@pytest.mark.parametrize("counts", [[5, 0, 40, 3], [0, 0, 48, 0], [16, 16, 16, 0]])
def test_groups_are_filled_up_to_what_float8_multiplies(counts: list[int]) -> None:
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    moved, new, total = aligned(ends, sum(counts))
    starts = [0, *new.tolist()[:-1]]
    assert all(end % 16 == 0 and end - start >= 16 for start, end in zip(starts, new, strict=True))
    assert new[-1] == total and total <= sum(counts) + 16 * (len(counts) + 1)
    first = [int(end) - count for end, count in zip(ends, counts, strict=True)]
    assert [a + int(by) for a, by in zip(first, moved, strict=True)] == starts
    assert all(b - a >= count for a, b, count in zip(starts, new, counts, strict=True))


def experts_of(kind: str, folder: Path) -> Any:
    torch.manual_seed(0)
    path = write_checkpoint(kind, folder / "m", **SIZES)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    module = next(iter(stacked(model).values()))
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return module


def passed(module: Any, num_tokens: int, *, is_sorted: bool = False) -> list[torch.Tensor]:
    """Return a module's result and gradients; of four experts one gets no token."""
    hidden = numbers(num_tokens, 32, dtype=torch.float32).requires_grad_()
    given: list[torch.Tensor] = []
    if not is_sorted:
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randint(0, 3, (num_tokens, 2), generator=generator)
        given = [chosen + (chosen == 1).long(), numbers(num_tokens, 2, seed=1, dtype=torch.float32)]
    result = module(hidden, *given)
    inputs = (hidden, *module.parameters())
    return [result.detach(), *torch.autograd.grad(result, inputs, numbers(*result.shape).float())]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "llama4_text"])
def test_every_layout_is_float8s_rounding_off(kind: str, tmp_path: Path) -> None:
    """Gated, transposed with biases, and sorted before the experts."""
    module = experts_of(kind, tmp_path)
    is_sorted = kind == "llama4_text"
    exact, ours = (
        passed(of(module), 64, is_sorted=is_sorted) for of in (GroupedExperts.of, Float8Experts.of)
    )
    for right, found in zip(exact, ours, strict=True):
        assert torch.isfinite(found).all()
        if found.ndim == 3:  # a bias's gradient may be exact
            assert not torch.equal(found, right)
        assert (found - right).norm() < 0.12 * right.norm()
        if not is_sorted and found.ndim == 3:
            assert not found[1].any()


def test_rows_that_fill_a_group_add_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    """With biases too: the same numbers if there are more of them."""
    module = Float8Experts.of(experts_of("gpt_oss", tmp_path))
    few = passed(module, 21)
    monkeypatch.setattr("raytrain_adv.ops.float8.experts.MULTIPLE", 64)
    for right, found in zip(few, passed(module, 21), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_compiled_module_is_one_graph_with_the_same_numbers(
    transposed: bool, backend: str, tmp_path: Path
) -> None:
    module = Float8Experts.of(experts_of("gpt_oss" if transposed else "mixtral", tmp_path))
    eager = passed(module, 24)
    compiled = passed(torch.compile(module, fullgraph=True, backend=backend), 24)
    for right, found in zip(eager, compiled, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


def test_a_trial_finds_float8s_rounding_and_what_is_wrong(monkeypatch: Any) -> None:
    cpu = torch.device("cpu")
    value, gradient = distance(64, 32, False, cpu, torch.bfloat16)
    assert 0.01 < value < 0.06 and 0.01 < gradient < 0.06
    right = operators._by_row
    monkeypatch.setattr(operators, "_by_row", lambda x: (right(x)[0], right(x)[1].roll(1, 0)))
    assert max(distance(64, 32, False, cpu, torch.bfloat16)) > 0.1


@pytest.mark.parametrize(
    ("matrices", "rows", "measured"),
    [
        ([(128, 1536, 2048)], 512, 0.54),
        ([(128, 2048, 768)], 512, 0.43),
        ([(32, 5760, 2880)], 1024, 0.84),
        ([(32, 2880, 2880)], 1024, 0.76),
        ([(8, 28672, 4096)], 2048, 1.18),
        ([(8, 4096, 14336)], 2048, 1.13),
    ],
)
def test_the_rule_gives_the_measured_speeds(
    matrices: list[tuple[int, int, int]], rows: int, measured: float
) -> None:
    assert speed(matrices, rows) == pytest.approx(measured, rel=0.07)
