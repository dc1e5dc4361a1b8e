"""Cast a matrix to e4m3 with a scale per row, in both layouts; multiply such matrices.

Scales are powers of two, as in torchao's rowwise recipes. A layout is the values [a, k], with the
summed dimension last, and the float32 multipliers [a, 1] that undo the scales.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from raytrain_adv.ops.float8.cast import E4M3, cast, scale_of

Layout = Sequence[Tensor]
"""Values, and what they are multiplied by."""


def define(tensor: Tensor, plain: bool, turned: bool) -> list[Tensor]:
    """Return what cast_rows does, in torch's operations."""
    wanted = (tensor,) * plain + (tensor.t().contiguous(),) * turned
    return [part for matrix in wanted for part in _rows(matrix)]


def _rows(tensor: Tensor) -> Layout:
    scale = scale_of(tensor.abs().amax(dim=1, keepdim=True), E4M3)
    scale = torch.exp2(torch.floor(torch.log2(scale)))
    return cast(tensor, scale, E4M3), scale.reciprocal()


def allocate(tensor: Tensor, plain: bool, turned: bool) -> list[Tensor]:
    """Return memory for the layouts of a matrix."""
    shapes = (tensor.shape,) * plain + (tensor.shape[::-1],) * turned
    return [
        tensor.new_empty(shape, dtype=dtype)
        for a, k in shapes
        for shape, dtype in (((a, k), E4M3), ((a, 1), torch.float32))
    ]


@torch.library.custom_op("raytrain_adv::cast_rows", mutates_args=())
def cast_rows(
    tensor: Tensor, plain: bool, turned: bool, after: Tensor | None = None
) -> list[Tensor]:
    """Return a matrix's layout if `plain`, and then that of its transpose if `turned`.

    For `after` see cast.transposed.
    """
    return cast_on_gpu(tensor, plain, turned) if tensor.is_cuda else define(tensor, plain, turned)


@cast_rows.register_fake
def _(tensor: Tensor, plain: bool, turned: bool, after: Tensor | None = None) -> list[Tensor]:
    return allocate(tensor, plain, turned)


def cast_on_gpu(tensor: Tensor, plain: bool, turned: bool) -> list[Tensor]:
    """Do what cast_rows does by the kernels."""
    from raytrain_adv.ops.float8.row_kernel import launch

    results = allocate(tensor, plain, turned)
    launch(tensor, results[:2] if plain else None, results[-2:] if turned else None)
    return results


def product(left: Layout, right: Layout, dtype: torch.dtype, fast: bool) -> Tensor:
    """Return left [a, k] @ right.t() [k, b] times both multipliers, rounded to bfloat16."""
    (values, rows), (other, columns) = left, right
    after = None
    if not fast and not _has_rows(values):
        after = rows * columns.t()
        rows = columns = rows.new_ones(1, 1)
    found: Tensor = torch._scaled_mm(
        values,
        other.t(),
        scale_a=rows,
        scale_b=columns.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )
    return found.to(dtype) if after is None else (found * after).to(torch.bfloat16).to(dtype)


def _has_rows(tensor: Tensor) -> bool:
    """Whether cuBLAS multiplies rows by their scales. CUTLASS does where it does not, slowly with
    exact sums: powers of two can be multiplied by afterwards, without another bit.

    Source: torch 2.11, _scaled_mm_out_cuda; torchao.float8.float8_ops.addmm_float8_unwrapped.
    """
    version = tuple(int(part) for part in (torch.version.cuda or "0").split("."))
    is_hopper = tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] == 9
    return is_hopper and version >= (12, 9)
