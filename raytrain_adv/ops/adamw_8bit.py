"""torchao's AdamW with 8-bit states: for sharded bf16 parameters too, and its states written again
from float32 values.
"""

import math
from typing import Any

import torch
from torch import Tensor

BLOCKS_AT_A_TIME = 2**16


def adamw_8bit(groups: Any, **options: Any) -> torch.optim.Optimizer:
    """Return torchao's AdamW8bit.

    A view of its states loses their dtype (torchao 0.18), and a sharded state is a view: for bf16
    parameters the first step failed. Remove when torchao's view keeps it.
    """
    from torchao.optim import AdamW8bit
    from torchao.optim.subclass_8bit import OptimState8bit

    @OptimState8bit.implements(torch.ops.aten.view.default)  # type: ignore[untyped-decorator] # torchao ships no types
    def view(func: Any, types: Any, args: tuple[Any, Any], kwargs: Any) -> Any:
        state, shape = args
        codes = state.codes.view(shape)
        return OptimState8bit(codes, state.scale, state.qmap, state.signed, dtype=state.dtype)

    optimizer: torch.optim.Optimizer = AdamW8bit(groups, **options)
    return optimizer


def values_of(state: Any) -> Tensor:
    """Return the float32 values of torchao's 8-bit optimizer state."""
    values: Tensor = state.dequantize()
    return values


def fill_8bit(state: Any, values: Tensor) -> None:
    """Fill torchao's 8-bit state some blocks at a time: codes pass through int64, 8x their size."""
    blocks = values.reshape(-1, state.block_size)
    codes, scales = state.codes.view(-1, state.block_size), state.scale
    for start in range(0, len(blocks), BLOCKS_AT_A_TIME):
        part = slice(start, start + BLOCKS_AT_A_TIME)
        codes[part], scales[part] = quantized(blocks[part], state.qmap)


def quantized(blocks: Tensor, qmap: Tensor) -> tuple[Tensor, Tensor]:
    """Return 8-bit codes and scales that give back exactly what was dequantized from such.

    torchao's scale is a block's largest magnitude, but its signed map reaches from -0.993 to 1: if
    that magnitude is negative, its scale was the magnitude / 0.993, or a neighbor of it in float32.
    `blocks` are float32 (blocks, values in one), `qmap` (256,) what each code stands for,
    ascending.
    """
    from torchao.optim.quant_utils import dequant_with_qmap, quantize_8bit_with_qmap, scale_tensor

    scaled, scales = scale_tensor(blocks, blocks.shape[1])
    codes = quantize_8bit_with_qmap(scaled, qmap)
    if qmap[0] == 0:  # the unsigned map holds its largest magnitude exactly
        return codes, scales
    estimate = blocks.abs().amax(-1) / -qmap[0]
    up, down = (estimate.nextafter(torch.full_like(estimate, end)) for end in (math.inf, 0.0))
    for candidates in (estimate, up, down):
        moved = (dequant_with_qmap(codes, qmap, scales) != blocks).any(-1)
        if not moved.any():
            break
        tried = quantize_8bit_with_qmap(blocks / candidates.unsqueeze(-1), qmap)
        exact = (dequant_with_qmap(tried, qmap, candidates) == blocks).all(-1) & moved
        codes = torch.where(exact.unsqueeze(-1), tried, codes)
        scales = torch.where(exact, candidates, scales)
    return codes, scales
