"""Stacked experts whose three grouped products run in float8, and which of them gain by that."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrain_adv.ops.experts import grouped as plain
from raytrain_adv.ops.experts.find import shapes
from raytrain_adv.ops.experts.grouped import Factors, GroupedExperts
from raytrain_adv.ops.float8.grouped import MULTIPLE, grouped, grouped_outer

PRODUCTS, CASTS = 0.48, 480
GAINS = 1.05
"""Speed relative to bf16 from which experts are multiplied in float8."""
PROBED = (112, 256)
"""Where the rows of two experts end in a trial."""


def speed(matrices: Iterable[tuple[int, int, int]], rows: float) -> float:
    """Return how fast grouped products in float8 are, relative to bf16: the three of a training
    step, with casts, of stacked matrices [expert, a, b] with so many rows per expert.

    A product takes PRODUCTS of its time in bf16, and its casts as long as their bytes: relative to
    the product that is CASTS x (1 / a + 1 / b + 1 / rows). Source: a fit to
    jobs/benchmarks/results/grouped_products.json (H200; the mean of even and uneven routing):
    Mixtral 8x7B's matrices 1.18 and 1.13 at 2,048 rows, gpt-oss-20b's 0.84 and 0.76 at 1,024,
    Qwen3-30B-A3B's 0.54 and 0.43 at 512; it gives 1.18, 1.16, 0.83, 0.78, 0.51 and 0.44.
    """
    sizes = [(a * b, PRODUCTS + CASTS * (1 / a + 1 / b + 1 / rows)) for _, a, b in matrices]
    return sum(size for size, _ in sizes) / sum(size * time for size, time in sizes)


@torch._dynamo.allow_in_graph
class _Product(torch.autograd.Function):
    """Grouped product in float8; weight is [expert, out, in], or [expert, in, out] transposed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        ctx.transposed = transposed
        product: Tensor = grouped(x, weight if transposed else weight.mT, ends)
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends = ctx.saved_tensors
        gradient, grad_x, grad_weight = gradients[0], None, None
        if ctx.needs_input_grad[0]:
            grad_x = grouped(gradient, weight.mT if ctx.transposed else weight, ends)
        if ctx.needs_input_grad[1]:
            factors = (x, gradient) if ctx.transposed else (gradient, x)
            grad_weight = grouped_outer(*factors, ends)
        return grad_x, grad_weight, None, None


@torch._dynamo.allow_in_graph
class _Take(torch.autograd.Function):
    """x[rows] of rows that are all different: its gradient is copied, not added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows = x.shape[0]
        return x[rows]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        gradient = gradients[0]
        zeros = gradient.new_zeros(ctx.num_rows, gradient.shape[1])
        return zeros.index_copy(0, rows, gradient), None


def aligned(ends: Tensor, num_rows: int) -> tuple[Tensor, Tensor, int]:
    """Return what each group's rows are moved by and where they end if each group has a multiple of
    16 rows, at least 16, and how many rows that are at most: the last group takes what is left.
    """
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    padded = (counts.clamp(min=1) + (MULTIPLE - 1)) // MULTIPLE * MULTIPLE
    new = padded.cumsum(0, dtype=torch.int32)
    total = -(-num_rows // MULTIPLE) * MULTIPLE + MULTIPLE * ends.shape[0]
    moved = (new - padded) - (ends - counts)
    return moved, torch.cat([new[:-1], new.new_full((1,), total)]), total


class Float8Experts(GroupedExperts):
    """Experts whose three grouped products run in float8, with a scale per row of each factor.

    Rows are filled up with zeros to groups that float8 multiplies; they add nothing.
    """

    @property
    def temporary_bytes(self) -> int:
        """Bytes of the larger matrix in float8, in forward and backward."""
        return max(a * b * c for a, b, c in shapes(self).values())

    @property
    def kinds(self) -> list[tuple[int, int, bool]]:
        """The sizes of each matrix, and whether they are [in, out] instead of [out, in]."""
        return [(a, b, self.layout.is_transposed) for _, a, b in shapes(self).values()]

    def multiply(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        """Return x times a stacked matrix: [rows, in] -> [rows, out]."""
        transposed = self.layout.is_transposed
        output: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x, getattr(self, name), ends, transposed
        )
        return output

    def bias_of(self, name: str) -> Tensor:
        """Return a matrix's biases, and zeros for rows of no expert: [expert + 1, out]."""
        return F.pad(super().bias_of(name), (0, 0, 0, 1))

    def _mlp(
        self, x: Tensor, ends: Tensor, experts: Tensor | None, adapters: dict[str, Factors]
    ) -> Tensor:
        if experts is None:  # every expert has all tokens of a pass, a multiple of 16
            return super()._mlp(x, ends, experts, adapters)
        moved, ends, total = aligned(ends, x.shape[0])
        rows = torch.arange(x.shape[0], device=x.device) + moved[experts]
        owners = experts.new_full((total,), moved.shape[0]).index_copy(0, rows, experts)
        padded = x.new_zeros(total, x.shape[1]).index_copy(0, rows, x)
        output = super()._mlp(padded, ends, owners, adapters)
        taken: Tensor = _Take.apply(output, rows)  # type: ignore[no-untyped-call]
        return taken


def distance(
    a: int, b: int, transposed: bool, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Return the relative error of a grouped product and of its gradients, in norm, for matrices
    [expert, a, b], against the product without float8; two experts stand for all.
    """
    from raytrain_adv.trial.compare import relative_error

    numbers = torch.Generator(device).manual_seed(0)
    width, out = (a, b) if transposed else (b, a)
    x, pull, weight = (
        torch.randn(*size, generator=numbers, device=device, dtype=dtype)
        for size in ((PROBED[-1], width), (PROBED[-1], out), (2, a, b))
    )
    ends = torch.tensor(PROBED, device=device, dtype=torch.int32)
    inputs = (x.requires_grad_(), weight.requires_grad_())
    results = []
    with torch.enable_grad():
        exact = plain.grouped(x, weight if transposed else weight.mT, ends)
        ours: Tensor = _Product.apply(x, weight, ends, transposed)  # type: ignore[no-untyped-call]
        for value in (exact, ours):
            results.append([value.detach(), *torch.autograd.grad(value, inputs, 1e-4 * pull)])
    off = [relative_error(one, right) for right, one in zip(*results, strict=True)]
    return off[0], max(off[1:])


def why_not(module: nn.Module) -> str:
    """Return why a module's experts cannot be multiplied in float8, if so."""
    if isinstance(module, GroupedExperts):
        return "experts with adapters or in few bits, whose grouped products stay in bf16"
    if any(size % MULTIPLE for _, *sizes in shapes(module).values() for size in sizes):
        return f"experts of {_sizes(module)}: not divisible by {MULTIPLE}"
    return ""


def why_slower(module: nn.Module, rows: float) -> str:
    """Return why a module's experts are left in bf16 although they can be multiplied in float8."""
    if not all(p.requires_grad for p in module.parameters(recurse=False)):
        return "frozen experts: FP8's gain was measured with the weights' gradients"
    return "" if speed_of(module, rows) >= GAINS else f"stay in bf16: {in_words(module, rows)}"


def speed_of(module: nn.Module, rows: float) -> float:
    """Return the speed of a module's grouped products with so many rows per expert; see speed."""
    return speed(shapes(module).values(), rows)


def in_words(module: nn.Module, rows: float) -> str:
    """Return the speed of a module's grouped products in float8 in words."""
    count = next(iter(shapes(module).values()))[0]
    what = f"products of {count} experts of {_sizes(module)}, about {rows:,.0f} rows each"
    return f"{what}, are {speed_of(module, rows):.2f} x as fast in FP8 as in bf16 on an H200"


def _sizes(module: nn.Module) -> str:
    return " and ".join(f"{a} x {b}" for _, a, b in shapes(module).values())
