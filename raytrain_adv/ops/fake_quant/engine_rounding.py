"""Round as engines do: in float32, and to four-bit floats. Gradients pass straight through.

Operations ignore `after`; see rounding.py.
"""

import torch

from raytrain_adv.ops.fake_quant.rounding import E4M3, EPS, divided, has_kernel
from raytrain_adv.ops.fake_quant.targets import BLOCK, FOUR_BIT_FLOATS, MXFP4

NVFP4_GLOBAL_SCALE = 512.0
"""What NVFP4's group scales are multiplied by before they are rounded to float8. The same for every
linear, so that engines which fuse linears lose nothing: group scales are then exact from 3.1e-5 to
0.87, which is weights up to 5.2.
"""
LEAST_AMAX = 1e-10
"""Of an expert's input. Source: vLLM 0.32, per_token_quant_int8."""
FLOAT4_LARGEST = 6.0
E4M3_LARGEST, E4M3_SMALLEST = 448.0, 2.0**-9


@torch.library.custom_op("raytrain_adv::quantize_rows", mutates_args=())
def quantize_rows(
    weight: torch.Tensor, after: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix in int8, and one float32 scale per row [rows, 1].

    Scales are rounded to the weight's dtype, in which transformers holds them; vLLM reads float32.
    Source: compressed-tensors 0.20, calculate_qparams, otherwise in float32.
    """
    if weight.is_cuda:
        from raytrain_adv.ops.fake_quant.engine_rounding_kernel import ROWS, launch

        integers, scale = _rows(weight)
        launch(ROWS, weight, integers, scale, eps=EPS)
        return integers, scale
    value = weight.to(torch.float32)
    scale = divided(value.abs().amax(dim=-1, keepdim=True).clamp(min=EPS), 127.5)
    scale = scale.to(weight.dtype).to(torch.float32)
    return torch.round(value / scale).clamp(-128, 127).to(torch.int8), scale


@quantize_rows.register_fake
def _rows(weight: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.new_empty((weight.shape[0], 1), dtype=torch.float32)
    return weight.new_empty(weight.shape, dtype=torch.int8), scale


def fake_quantize_rows(weight: torch.Tensor, after: torch.Tensor | None = None) -> torch.Tensor:
    """Return a matrix rounded to int8 with one scale per row; see quantize_rows."""
    integers, scale = quantize_rows(weight, after)
    rounded: torch.Tensor = (integers.to(torch.float32) * scale).to(weight.dtype)
    return rounded


def tokens_in_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what quantize_tokens does, in operators that torch.compile can fuse."""
    value = x.to(torch.float32)
    low, high = value.amin(dim=-1, keepdim=True), value.amax(dim=-1, keepdim=True)
    scale = divided(high - low, 255).clamp(min=EPS)
    zero_point = torch.round(-128 - low / scale)
    integers = (torch.round(value / scale) + zero_point).clamp(-128, 127)
    return integers.to(torch.int8), scale, zero_point.to(torch.int32)


@torch.library.custom_op("raytrain_adv::quantize_tokens", mutates_args=())
def quantize_tokens(
    x: torch.Tensor, after: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return activations [..., features] in asymmetric int8, one range per token.

    Source: vLLM 0.32, dynamic_scaled_int8_azp_quant; onednn_scaled_int8_quant gives the same scales
    and zero points, and 99.95 % of the same integers.

    Returns:
        Integers in int8; float32 scales [..., 1]; zero points [..., 1] in int32.
    """
    if not x.is_cuda:
        return tokens_in_int8(x)
    from raytrain_adv.ops.fake_quant.engine_rounding_kernel import TOKENS, launch

    integers, scale, zero_point = _tokens(x)
    launch(TOKENS, x, integers, scale, zero_point, eps=EPS)
    return integers, scale, zero_point


@quantize_tokens.register_fake
def _tokens(x: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ranges = (*x.shape[:-1], 1)
    scale = x.new_empty(ranges, dtype=torch.float32)
    integers = x.new_empty(x.shape, dtype=torch.int8)
    return integers, scale, x.new_empty(ranges, dtype=torch.int32)


def fake_quantize_tokens_in_float32(
    x: torch.Tensor, after: torch.Tensor | None = None
) -> torch.Tensor:
    """Return activations rounded to asymmetric int8; see quantize_tokens."""
    integers, scale, zero_point = quantize_tokens(x, after)
    centered = (integers.to(torch.int32) - zero_point).to(torch.float32)
    rounded: torch.Tensor = (centered * scale).to(x.dtype)
    return rounded


@torch.library.custom_op("raytrain_adv::fake_quantize_inputs_of_experts", mutates_args=())
def fake_quantize_inputs_of_experts(
    x: torch.Tensor, after: torch.Tensor | None = None
) -> torch.Tensor:
    """Return activations [..., features] rounded to symmetric int8, one float32 scale per token.

    Source: vLLM 0.32, per_token_quant_int8, which experts take whatever config.json has.
    """
    if x.is_cuda:
        from raytrain_adv.ops.fake_quant.engine_rounding_kernel import SYMMETRIC_TOKENS, launch

        rounded, scale = x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)
        launch(SYMMETRIC_TOKENS, x, rounded, scale, eps=LEAST_AMAX)
        return rounded
    value = x.to(torch.float32)
    amax = value.abs().amax(dim=-1, keepdim=True).clamp(min=LEAST_AMAX)
    integers = torch.round(value * (torch.full_like(amax, 127.0) / amax))
    return (integers * divided(amax, 127.0)).to(x.dtype)


@fake_quantize_inputs_of_experts.register_fake
def _(x: torch.Tensor, after: torch.Tensor | None = None) -> torch.Tensor:
    return torch.empty_like(x)


def int8_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x @ weight.t() + bias as engines compute it: a sum of int8 products in int32, then
    both scales in float32.
    """
    integers, scale, zero_point = quantize_tokens(x.reshape(-1, x.shape[-1]))
    of_weight, weight_scale = quantize_rows(weight)
    sums = _integer_sums(integers, of_weight) - zero_point * of_weight.sum(1, dtype=torch.int32)
    output = sums.to(torch.float32) * scale * weight_scale.t()
    if bias is not None:
        output = output + bias.to(torch.float32)
    shaped: torch.Tensor = output.to(x.dtype).view(*x.shape[:-1], weight.shape[0])
    return shaped


def _integer_sums(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left [rows, k] @ right.t() [k, columns] in int32, of int8 matrices."""
    rows, (columns, k) = left.shape[0], right.shape
    if left.is_cuda and (columns % 8 or k % 8):  # cuBLAS takes no other sizes
        return (left.to(torch.float64) @ right.to(torch.float64).t()).to(torch.int32)
    if left.is_cuda and rows <= 16:
        left = torch.nn.functional.pad(left, (0, 0, 0, 17 - rows))
    return torch._int_mm(left, right.t())[:rows]


@torch.library.custom_op("raytrain_adv::quantize_float8_blocks", mutates_args=())
def quantize_float8_blocks(
    weight: torch.Tensor, after: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix in float8_e4m3fn, and one float32 scale per block of 128 rows and columns.

    Scales are rounded to the weight's dtype. Rows and columns are multiples of 128.
    Source: compressed-tensors 0.20, FP8_BLOCK, otherwise in float32.
    """
    if has_kernel(weight):
        from raytrain_adv.ops.fake_quant.engine_rounding_kernel import FLOAT8_BLOCKS, launch

        values, scale = _blocks(weight)
        launch(FLOAT8_BLOCKS, weight, values, scale, eps=EPS)
        return values, scale
    blocks = _in_blocks(weight)
    scale = divided(blocks.abs().amax(dim=(1, 3)).clamp(min=EPS), E4M3_LARGEST)
    scale = scale.to(weight.dtype).to(torch.float32)
    values = (blocks / scale[:, None, :, None]).clamp(-E4M3_LARGEST, E4M3_LARGEST)
    return values.to(E4M3).view(weight.shape), scale


@quantize_float8_blocks.register_fake
def _blocks(weight: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (weight.shape[0] // BLOCK, weight.shape[1] // BLOCK)
    values = weight.new_empty(weight.shape, dtype=E4M3)
    return values, weight.new_empty(shape, dtype=torch.float32)


def _in_blocks(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix as float32 [row blocks, BLOCK, column blocks, BLOCK]."""
    rows, columns = matrix.shape
    return matrix.to(torch.float32).reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)


def of_blocks(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return values [rows, columns] times the scales of their blocks, in float32."""
    blocks = _in_blocks(values)
    return (blocks * scale.to(torch.float32)[:, None, :, None]).view(values.shape)


def fake_quantize_float8_blocks(
    weight: torch.Tensor, after: torch.Tensor | None = None
) -> torch.Tensor:
    """Return a matrix rounded to float8 in blocks; see quantize_float8_blocks."""
    return of_blocks(*quantize_float8_blocks(weight, after)).to(weight.dtype)


@torch.library.custom_op("raytrain_adv::quantize_float4", mutates_args=())
def quantize_float4(
    weight: torch.Tensor, form: str, after: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix in the values of E2M1, and float32 scales [rows, groups].

    nvfp4: groups of 16, scales in float8_e4m3fn / NVFP4_GLOBAL_SCALE. mxfp4: groups of 32, scales
    powers of two. Products of values and scales are exact in bfloat16.

    Source: compressed-tensors 0.20, calculate_qparams and generate_mx_scales, in float32.
    """
    if has_kernel(weight):
        from raytrain_adv.ops.fake_quant import engine_rounding_kernel as kernel

        values, scale = _float4(weight, form)
        kernel.launch(kernel.MXFP4 if form == MXFP4 else kernel.NVFP4, weight, values, scale)
        return values, scale
    groups = weight.to(torch.float32).reshape(weight.shape[0], -1, FOUR_BIT_FLOATS[form])
    amax = groups.abs().amax(dim=-1)
    if form == MXFP4:
        # Mantissas from 1.75 on are rounded up to the next power of two.
        exponent = ((amax.view(torch.int32) + (1 << 21)) >> 23) - 2
        scale = (exponent.clamp(min=1, max=254) << 23).view(torch.float32)
    else:
        wanted = divided(amax, FLOAT4_LARGEST) * NVFP4_GLOBAL_SCALE
        wanted = wanted.clamp(E4M3_SMALLEST, E4M3_LARGEST)
        scale = divided(wanted.to(E4M3).to(torch.float32), NVFP4_GLOBAL_SCALE)
    value = (groups / scale.unsqueeze(-1)).clamp(-FLOAT4_LARGEST, FLOAT4_LARGEST)
    step = torch.where(value.abs() < 2, 0.5, torch.where(value.abs() < 4, 1.0, 2.0))
    rounded = torch.round(value / step) * step
    return rounded.flatten(-2).to(weight.dtype), scale


@quantize_float4.register_fake
def _float4(weight: torch.Tensor, form: str, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    scale = weight.new_empty((rows, columns // FOUR_BIT_FLOATS[form]), dtype=torch.float32)
    return weight.new_empty(weight.shape), scale


def fake_quantize_float4(
    weight: torch.Tensor, form: str, after: torch.Tensor | None = None
) -> torch.Tensor:
    """Return a matrix rounded to four-bit floats; see quantize_float4."""
    values, scale = quantize_float4(weight, form, after)
    groups = values.to(torch.float32).view(*scale.shape, -1) * scale.unsqueeze(-1)
    rounded: torch.Tensor = groups.flatten(-2).to(weight.dtype)
    return rounded
