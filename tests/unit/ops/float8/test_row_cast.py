"""Casts by row: torchao's to the bit, and their kernels in Triton's interpreter."""

import pytest
import torch
from torchao.float8.config import ScalingGranularity
from torchao.float8.float8_utils import tensor_to_scale

from raytrain_adv.ops.float8.cast import E4M3, cast
from raytrain_adv.ops.float8.row_cast import allocate, cast_rows
from tests.processes import interpreted


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return numbers whose rows are of very different sizes."""
    seed = torch.Generator().manual_seed(0)
    sizes = torch.exp(4 * torch.randn(shape[0], 1, generator=seed))
    return (torch.randn(shape, generator=seed) * sizes).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_torchaos_to_the_bit(dtype):
    tensor = numbers(48, 272, dtype=dtype)
    results = cast_rows(tensor, True, True)
    for dim, values, multiplier in ((1, *results[:2]), (0, *results[2:])):
        scale = tensor_to_scale(
            tensor,
            E4M3,
            scaling_granularity=ScalingGranularity.AXISWISE,
            axiswise_dim=dim,
            round_scales_to_power_of_2=True,
        )
        expected = cast(tensor, scale, E4M3)
        assert torch.equal(values.float(), (expected if dim else expected.t()).float())
        assert torch.equal(multiplier.flatten(), scale.reciprocal().flatten())


def test_the_custom_operator_keeps_torchs_rules():
    tensor = numbers(32, 48)
    torch.library.opcheck(cast_rows, (tensor, True, True))
    torch.library.opcheck(cast_rows, (tensor, False, True, tensor))
    for wanted in ((True, True), (True, False), (False, True)):
        found, memory = cast_rows(tensor, *wanted), allocate(tensor, *wanted)
        assert [(t.shape, t.stride(), t.dtype) for t in found] == [
            (t.shape, t.stride(), t.dtype) for t in memory
        ]


CHECK = """
import torch
from triton.runtime.autotuner import Autotuner
from raytrain_adv.ops.float8.row_cast import cast_on_gpu, define

Autotuner._bench = lambda *args, **options: [1.0] * 3
for shape in ((129, 72), (200, 72), (17, 2050)):
    # Numbers that float8 holds exactly: the interpreter does not round as a GPU does.
    numbers = torch.Generator().manual_seed(0)
    source = 2.0 ** torch.randint(-3, 3, shape, generator=numbers)
    source[:, ::16] = source[::16] = -7
    source[1] = 0
    # What is masked is so in either dtype: one of the shapes is enough for float32.
    for dtype in (torch.bfloat16, torch.float32)[: 2 if shape == (129, 72) else 1]:
        for wanted in ((True, True), (True, False), (False, True)):
            found = cast_on_gpu(source.to(dtype), *wanted)
            expected = define(source.to(dtype), *wanted)
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one.float(), other.float()), (shape, dtype, wanted)
"""


def test_the_kernels_cast_as_defined_at_sizes_no_tile_divides():
    pytest.importorskip("triton", reason="Triton is for Linux alone")
    interpreted(CHECK)
