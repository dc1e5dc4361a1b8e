"""Round a tensor to torchao's quantized values, operation by operation, in its own dtype.

Operations ignore `after`. In backward it is the gradient: without it Inductor would find the same
call in forward, and keep its result, for a weight unsharded, until backward.
"""

from typing import Any

import torch
from torch import Tensor

from raytrain_adv.ops.fake_quant.targets import Q4_0, Q8_0

BITS = {"int2": 2, "int3": 3, "int4": 4, "int8": 8, Q4_0: 4, Q8_0: 8}
"""Bits of integer weights that torchao stores and loads, and of GGUF's."""
LEAST_SCALE = {Q4_0: 2.0**-17, Q8_0: 2.0**-17}
"""Smallest scale of GGUF's blocks: bfloat16 scales from it on are exact in float16."""
LEAST_TOKEN_SCALE = 1 / (448 * 512)
"""Of a token in float8. Source: vLLM's dynamic_per_token_scaled_fp8_quant."""
EPS = 1e-12
"""Smallest amax of a scaled row: without it a row of zeros becomes NaN (pytorch/ao#4713)."""
E4M3 = torch.float8_e4m3fn
SMALLEST, LARGEST = -128, 127


def bounds(bits: int) -> tuple[int, int]:
    """Return the smallest and largest signed integer of so many bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def divided(x: Tensor, by: float) -> Tensor:
    """Return x / by with the same bits on every device: CUDA multiplies by the reciprocal of a
    Python number (torch 2.11, div_true_kernel_cuda), and exports may be made on a CPU.
    """
    return x / torch.full((), by, dtype=x.dtype, device=x.device)


def has_kernel(x: Tensor) -> bool:
    """Whether a kernel can round a tensor to float8: Triton has it from compute capability 8.9."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 9)


def _groups(weight: Tensor, bits: int, group_size: int, *_: object) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    return weight.new_empty((rows, columns)), weight.new_empty((rows, columns // group_size))


@torch.library.custom_op("raytrain_adv::fake_quantize_groups", mutates_args=())
def fake_quantize_groups(
    weight: Tensor,
    bits: int,
    group_size: int,
    after: Tensor | None = None,
    least_scale: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return a matrix rounded to symmetric integers, and their scales [rows, columns / group_size].

    Source: torchao.quantization.IntxUnpackedToInt8Tensor.from_hp and dequantize, torchao 0.18. Both
    are of the weight's dtype, float32 or bfloat16. Scales are at least `least_scale`.
    """
    if not weight.is_cuda:
        return round_groups(weight, bits, group_size, least_scale)
    from raytrain_adv.ops.fake_quant.rounding_kernel import launch

    rounded, scale = _groups(weight, bits, group_size)
    launch(weight.contiguous(), rounded, scale, None, group_size, bounds(bits), least_scale)
    return rounded, scale


def round_groups(
    weight: Tensor, bits: int, group_size: int, least_scale: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Do what fake_quantize_groups does by torchao's own operations, on any device."""
    quantized = integers_of(weight, bits, group_size, least_scale)
    return quantized.dequantize(), quantized.scale


def integers_of(weight: Tensor, bits: int, group_size: int, least_scale: float = 0.0) -> Any:
    """Return torchao's IntxUnpackedToInt8Tensor of a matrix."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    how = ((1, group_size), getattr(torch, f"int{bits}"))
    quantized = IntxUnpackedToInt8Tensor.from_hp(weight, *how)
    if not least_scale:
        return quantized
    return IntxUnpackedToInt8Tensor.from_hp(
        weight,
        *how,
        intx_choose_qparams_algorithm=None,
        custom_scale=quantized.scale.clamp(min=least_scale),
        custom_zero_point=quantized.zero_point,
    )


def _tokens(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    ranges = (*x.shape[:-1], 1)
    return x.new_empty(x.shape), x.new_empty(ranges), x.new_empty(ranges, dtype=torch.int8)


@torch.library.custom_op("raytrain_adv::fake_quantize_tokens", mutates_args=())
def fake_quantize_tokens(x: Tensor, after: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return activations [..., features] rounded to asymmetric int8, one range per token, with
    scales [..., 1] of x's dtype and zero points [..., 1] in int8.

    Source: torchao 0.18, _apply_int8_act_asym_per_token_quant_dequant.
    """
    if not x.is_cuda:
        return round_tokens(x)
    from raytrain_adv.ops.fake_quant.rounding_kernel import launch

    rounded, scale, zero_point = _tokens(x)
    launch(x.contiguous(), rounded, scale, zero_point, x.shape[-1], (SMALLEST, LARGEST))
    return rounded, scale, zero_point


def round_tokens(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Do what fake_quantize_tokens does by torchao's own operations, on any device."""
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    block = (1,) * (x.ndim - 1) + (x.shape[-1],)
    scale, zero_point = choose_qparams_affine(
        x,
        MappingType.ASYMMETRIC,
        block,
        target_dtype=torch.int8,
        quant_min=SMALLEST,
        quant_max=LARGEST,
        zero_point_dtype=torch.int8,
    )
    shared = (block, scale, zero_point)
    integers = quantize_affine(x, *shared, torch.int8, SMALLEST, LARGEST)
    rounded = dequantize_affine(
        integers, *shared, torch.int8, SMALLEST, LARGEST, output_dtype=x.dtype
    )
    ranges = (*x.shape[:-1], 1)
    return rounded, scale.reshape(ranges), zero_point.reshape(ranges)


@torch.library.custom_op("raytrain_adv::quantize_float8", mutates_args=())
def quantize_float8(
    x: Tensor,
    after: Tensor | None = None,
    in_float32: bool = False,
    least_scale: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return x in float8_e4m3fn, and one float32 scale per row [..., 1], at least `least_scale`.

    Source: torchao.quantization.Float8Tensor.from_hp, torchao 0.18, bounded by EPS: the scale is
    rounded to x's dtype. `in_float32`: it is not, as in engines.
    """
    if has_kernel(x):
        from raytrain_adv.ops.fake_quant import engine_rounding_kernel as kernel

        values, scale = _float8(x)
        form = kernel.FLOAT8 if in_float32 else kernel.FLOAT8_IN_DTYPE
        eps = float(torch.tensor(EPS, dtype=x.dtype))
        kernel.launch(form, x, values, scale, eps=eps, least_scale=least_scale)
        return values, scale
    amax = x.abs().amax(dim=-1, keepdim=True).clamp(min=EPS)
    amax = amax.to(torch.float32) if in_float32 else amax
    largest = torch.finfo(E4M3).max
    scale = divided(amax, largest).to(torch.float32).clamp(min=least_scale)
    return (x.to(torch.float32) / scale).clamp(min=-largest, max=largest).to(E4M3), scale


def _float8(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=E4M3), scale


fake_quantize_groups.register_fake(_groups)
fake_quantize_tokens.register_fake(_tokens)
quantize_float8.register_fake(_float8)


def fake_quantize_float8(
    x: Tensor,
    after: Tensor | None = None,
    in_float32: bool = False,
    least_scale: float = 0.0,
) -> Tensor:
    """Return a tensor rounded to float8_e4m3fn with one scale per row; see quantize_float8."""
    values, scale = quantize_float8(x, after, in_float32, least_scale)
    rounded: Tensor = (values.to(torch.float32) * scale).to(x.dtype)
    return rounded


def through_groups(gradient: Tensor, weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the gradient straight through fake_quantize_groups: 0 for values that were cut off.

    Scaling there and back is what torchao's operations do; it rounds in bfloat16.
    """
    groups = (*scale.shape, -1)
    passed = through(gradient.view(groups), weight.view(groups), scale.unsqueeze(-1), 0, bits)
    return passed.view(weight.shape)


def through(
    gradient: Tensor, value: Tensor, scale: Tensor, zero_point: Tensor | int, bits: int
) -> Tensor:
    """Return the gradient where a value's integer is in range, zero elsewhere."""
    smallest, largest = bounds(bits)
    inverse = scale.reciprocal()
    integer = torch.round(value * inverse) + zero_point
    inside = (integer >= smallest) & (integer <= largest)
    return torch.where(inside, gradient * scale, 0.0) * inverse
