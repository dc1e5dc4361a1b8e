"""The kernel of engines' roundings in Triton's interpreter: the bits of the formulas for a CPU."""

from tests.processes import interpreted

CHECK = """
import numpy
import torch
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime.interpreter import TensorHandle

from raytrain_adv.ops.fake_quant import engine_rounding, rounding
from raytrain_adv.ops.fake_quant import engine_rounding_kernel as kernel

def rint(x):  # the interpreter has no libdevice
    return tl.tensor(TensorHandle(numpy.rint(x.handle.data), x.handle.dtype), x.type)

libdevice.rint = rint
torch.manual_seed(0)
for size in (64, 100, 576, 4104):
    x = torch.randn(9, size)
    x[1], x[2], x[3] = 0, x[2] * 1e-11, x[3] * 1e30
    x[4], x[5], x[6, 0] = x[4].abs() + 1, -x[5].abs() - 1, 300
    integers, scale = engine_rounding._rows(x)
    kernel.launch(kernel.ROWS, x, integers, scale, eps=rounding.EPS)
    for found, wanted in zip((integers, scale), engine_rounding.quantize_rows(x), strict=True):
        assert torch.equal(found, wanted), size
    for of in (x, x.to(torch.bfloat16)):
        found = engine_rounding._tokens(of)
        kernel.launch(kernel.TOKENS, of, *found, eps=rounding.EPS)
        wanted = engine_rounding.quantize_tokens(of)
        assert all(map(torch.equal, found, wanted)), (size, of.dtype)
    rounded, scale = torch.empty_like(x), torch.empty(len(x))
    kernel.launch(kernel.SYMMETRIC_TOKENS, x, rounded, scale, eps=engine_rounding.LEAST_AMAX)
    assert torch.equal(rounded, engine_rounding.fake_quantize_inputs_of_experts(x)), size
    values, scale = rounding._float8(x)
    least = rounding.LEAST_TOKEN_SCALE
    kernel.launch(kernel.FLOAT8, x, values, scale, eps=rounding.EPS, least_scale=least)
    wanted = rounding.quantize_float8(x, None, True, least)
    assert torch.equal(scale, wanted[1]), size
    # The interpreter carries no mantissa into the exponent of float8.
    off = (values.float() - wanted[0].float()).abs()
    assert (off <= wanted[0].float().abs() / 2 + 2**-9).all(), size
    for form in ("mxfp4", "nvfp4"):
        of = x[:, :64].contiguous()
        if form == "nvfp4":  # scales that float8 holds exactly
            of = torch.where(of.abs() > 3, 3.0, of).view(-1, 16) / 512 * 4
            of[:, 0] = 6 / 512 * 2.0 ** (torch.arange(len(of)) % 5)
            of = of.view(9, 64)
        found = engine_rounding._float4(of, form)
        kernel.launch(kernel.MXFP4 if form == "mxfp4" else kernel.NVFP4, of, *found)
        wanted = engine_rounding.quantize_float4(of, form)
        assert all(map(torch.equal, found, wanted)), (size, form)
    matrix = torch.randn(384, 256) * torch.arange(1, 385)[:, None]
    found, wanted = engine_rounding._blocks(matrix), engine_rounding.quantize_float8_blocks(matrix)
    kernel.launch(kernel.FLOAT8_BLOCKS, matrix, *found, eps=rounding.EPS)
    off = (found[0].float() - wanted[0].float()).abs()
    assert torch.equal(found[1], wanted[1]) and (off <= wanted[0].float().abs() / 2 + 2**-9).all()
    none, nowhere = x[:0], torch.empty(0)
    kernel.launch(kernel.SYMMETRIC_TOKENS, none, none.clone(), nowhere)
    broken = x.clone()
    broken[3, 7], broken[5, 2] = float("nan"), float("inf")
    for form, of in enumerate((integers, integers, rounded, values, values)):
        zero_point = torch.zeros(len(x), dtype=torch.int32)
        kernel.launch(form, broken, of, scale, zero_point, eps=rounding.EPS)
        assert scale.isfinite().flatten().tolist() == [n not in (3, 5) for n in range(9)], form
"""


def test_it_rounds_to_the_same_bits_and_hides_no_nan() -> None:
    interpreted(CHECK)
