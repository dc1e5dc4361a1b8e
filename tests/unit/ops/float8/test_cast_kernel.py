"""The cast's kernels in Triton's interpreter: values at sizes no tile divides, and when tiles are
tuned.
"""

import pytest
import torch

from tests.processes import interpreted

pytest.importorskip("triton", reason="Triton is for Linux alone")

CHECK = """
import torch
from triton.runtime.autotuner import Autotuner
from raytrain_adv.ops.float8.cast_kernel import launch, launch_transpose

tuned = []
Autotuner._bench = lambda self, *args, config, **options: tuned.append(config) or [1.0] * 3
scale = torch.tensor(2.0)
for rows in (129, 200, 256, 257):
    # Numbers that float8 holds exactly: the interpreter does not round as a GPU does.
    numbers = torch.Generator().manual_seed(rows)
    source = torch.randint(-8, 9, (rows, 72), generator=numbers).bfloat16()
    plain = torch.empty(rows, 72, dtype=torch.float8_e4m3fn)
    transposed = torch.empty(72, rows, dtype=torch.float8_e4m3fn)
    launch(source, scale, plain, transposed)
    expected = (source * scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(plain.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(transposed.view(torch.uint8), expected.view(torch.uint8).t())
    again = torch.empty_like(transposed)
    launch(source.float(), scale, None, again)
    assert torch.equal(again.view(torch.uint8), transposed.view(torch.uint8))
    back = torch.empty_like(plain)
    launch_transpose(transposed, back)
    assert torch.equal(back.view(torch.uint8), plain.view(torch.uint8))
print("TUNED", len(tuned))
"""


def test_casts_are_exact_and_lengths_that_are_alike_are_tuned_for_once():
    """Each number of tokens used to be, which took seconds a batch without packing."""
    # The cast, and the transpose of either side: two classes of lengths, four tile sizes.
    assert "TUNED 24" in interpreted(CHECK)


def test_classes_of_lengths_are_powers_of_two():
    from raytrain_adv.ops.float8.cast_kernel import size_class

    assert [size_class(n) for n in (0, 1, 2, 3, 129, 256, 257)] == [1, 1, 2, 4, 256, 256, 512]
    assert torch.tensor([size_class(n) for n in range(8193, 16385)]).unique().numel() == 1
