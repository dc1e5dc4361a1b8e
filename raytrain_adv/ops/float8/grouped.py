"""Grouped products in float8: each expert's rows times its matrix, with a scale per row.

Factors are cast by torchao's kernels and multiplied as its `_Float8GroupedMM` does, in operators
that torch.compile takes as they are. On a CPU the casts and the product are what these define.
"""

from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from raytrain_adv.ops.float8.cast import E4M3, cast, scale_of

MULTIPLE = 16
"""Rows of each group are divisible by this, and so are the sizes of matrices."""
Cast = tuple[Tensor, Tensor]
"""Values in float8, and the float32 scales that they were multiplied by."""
SCALED = "aten::_scaled_grouped_mm"


@torch.library.custom_op("raytrain_adv::float8_grouped_mm", mutates_args=())
def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Return each group's rows times its matrix, [rows, k] x [group, k, n] -> [rows, n]; `ends`
    [group], int32, is where each one's rows end, the last one's at the last row.
    """
    (left, left_scale), (right, right_scale) = _by_row(x.contiguous()), _by_column(weight)
    return _multiply(left, right, left_scale.flatten(), right_scale.flatten(1), ends, x.dtype)


@torch.library.custom_op("raytrain_adv::float8_grouped_outer_mm", mutates_args=())
def grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Return per group left.t() @ right of its rows: [rows, a], [rows, b] -> [group, a, b]."""
    left8, left_scale, right8, right_scale = _by_group(left.contiguous(), right.contiguous(), ends)
    return _multiply(left8.t(), right8, left_scale, right_scale, ends, left.dtype)


@grouped.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@grouped_outer.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


def _multiply(
    left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor, ends: Tensor, dtype: Any
) -> Tensor:
    by = left_scale.reciprocal(), right_scale.reciprocal()
    options: dict[str, Any] = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    return torch._scaled_grouped_mm(left, right, *by, ends, **options).to(dtype)


def _by_row(x: Tensor) -> Cast:
    """Cast [rows, k]; scales [rows, 1]."""
    if not x.is_cuda:
        return _of(x)
    found: Cast = _torchao().triton_fp8_rowwise_2d_scale_and_cast(x, E4M3, True)
    return found


def _by_column(weight: Tensor) -> Cast:
    """Cast [group, k, n] into memory with k last; scales [group, 1, n]."""
    if not weight.is_cuda:
        values, scale = _of(weight.mT)
        return values.mT, scale.mT
    if weight.stride(-2) == 1:
        values, scale = _torchao().triton_fp8_colwise_3d_scale_and_cast(weight, E4M3, True)
        return values, scale
    turned = weight.contiguous().mT
    values, scale = _torchao().triton_fp8_rowwise_3d_transpose_rhs(turned, E4M3, True)
    return values, scale.unsqueeze(1)


def _by_group(left: Tensor, right: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cast [rows, a] and [rows, b] into memory with rows last; scales [group x a], [group x b]."""
    if left.is_cuda:
        both = _torchao().triton_fp8_per_group_colwise_scales_dual(left, right, ends, E4M3, True)
        return both[0], both[1], both[2], both[3]
    both = []
    for matrix in (left, right):
        groups = matrix.t().tensor_split(ends[:-1].long(), dim=1)
        values, scales = zip(*(_of(group) for group in groups), strict=True)
        both += [torch.cat([v.view(torch.uint8) for v in values], 1).view(E4M3).t()]
        both += [torch.cat(scales).flatten()]
    return both[0], both[1], both[2], both[3]


def _of(x: Tensor) -> Cast:
    """Cast a tensor with a scale for each row, a power of two as torchao's; scales [..., 1]."""
    amax = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    scale = torch.exp2(torch.floor(torch.log2(scale_of(amax, E4M3))))
    return cast(x, scale, E4M3).contiguous(), scale


@cache
def _torchao() -> Any:
    """Return torchao's kernels. The one that casts by group would be tuned again for each number of
    rows, in mid-training: here once for each pair of widths (torchao 0.18; remove when its key has
    no K).
    """
    from torchao.prototype.moe_training import kernels
    from torchao.prototype.moe_training.kernels import jagged_float8_scales as jagged

    jagged._triton_fp8_per_group_colwise_scales_dual_kernel.keys = ["N_GROUPS", "N1", "N2"]
    return kernels


def _on_cpu(
    left: Tensor,
    right: Tensor,
    left_by: Tensor,
    right_by: Tensor,
    offs: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """Compute torch._scaled_grouped_mm, which PyTorch has for GPUs alone: [rows, k] x [group, k, n]
    by groups of rows, or [m, rows] x [rows, n] by groups of the summed rows.
    """
    ends = [0, *offs.tolist()]
    parts = [slice(*pair) for pair in pairwise(ends)]
    if right.ndim == 3:
        sums = [left[of].float() @ right[g].float() for g, of in enumerate(parts)]
        by = [left_by[of, None] * right_by[g] for g, of in enumerate(parts)]
        found = torch.cat([a * b for a, b in zip(sums, by, strict=True)])
    else:
        sums = [left[:, of].float() @ right[of].float() for of in parts]
        scales = left_by.view(len(parts), -1, 1) * right_by.view(len(parts), 1, -1)
        found = torch.stack(sums) * scales
    return found.to(out_dtype or torch.bfloat16)


if not torch._C._dispatch_has_kernel_for_dispatch_key(SCALED, "CPU"):
    _LIBRARY: Any = torch.library.Library("aten", "IMPL", "CPU")  # type: ignore[no-untyped-call]
    _LIBRARY.impl("_scaled_grouped_mm", _on_cpu)


def wrong_casts(dtype: torch.dtype, device: torch.device) -> list[str]:
    """Cast matrices on a GPU with each tile of torchao's tuners; return those whose bits are not
    those of the definition. See wrong_tiles of cast_kernel.
    """
    from torchao.prototype.moe_training.kernels import float8_rowwise as rowwise
    from torchao.prototype.moe_training.kernels import jagged_float8_scales as jagged

    from raytrain_adv.ops.float8.cast_kernel import only

    numbers = torch.Generator().manual_seed(0)
    x, y = (torch.randn(272, width, generator=numbers).to(dtype) for width in (528, 144))
    weight = torch.randn(2, 144, 272, generator=numbers).to(dtype)
    ends = torch.tensor([112, 128, 272], dtype=torch.int32)
    cases: list[tuple[Any, Any, tuple[Tensor, ...]]] = [
        (rowwise._triton_fp8_rowwise_2d_fused_scale_and_cast_kernel, _by_row, (x,)),
        (rowwise._triton_fp8_colwise_3d_scale_and_cast_kernel, _by_column, (weight.mT,)),
        (rowwise._triton_fp8_rowwise_3d_transpose_cast_rhs_kernel, _by_column, (weight,)),
        (jagged._triton_fp8_per_group_colwise_scales_dual_kernel, _by_group, (x, y, ends)),
    ]
    wrong = []
    for tuner, casts, given in cases:
        for tile in list(tuner.configs):
            with only(tile, tuner):
                found = casts(*(t.to(device) for t in given))
            pairs = zip(found, casts(*given), strict=True)
            if not all(torch.equal(_bytes(a), _bytes(b)) for a, b in pairs):
                wrong.append(f"torchao's {tuner.base_fn.__name__}, tile {tile}")
    return wrong


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)
