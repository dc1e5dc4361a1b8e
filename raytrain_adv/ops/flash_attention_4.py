"""FlashAttention-4 (package flash-attn-4) as operators, which torch.compile takes into its graphs.

The functions have the names and arguments of a flash attention kernel of the Hub. The package
compiles a kernel for each form of attention when it is first called, in about seven seconds.
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("raytrain_adv::flash_attn_4_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor | None,
    longest: int | None,
    scale: float | None,
    window: int | None,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Return attention's output and the float32 logarithms of its sums, [..., heads, time]."""
    from flash_attn.cute.interface import _flash_attn_fwd

    output, sums, *_ = _flash_attn_fwd(
        q, k, v, return_lse=True, **_arguments(bounds, longest, scale, window, softcap)
    )
    return output, sums


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_others: Any) -> tuple[Tensor, Tensor]:
    *rows, time, heads, _features = q.shape
    sums = q.new_empty((*rows, heads, time), dtype=torch.float32)
    return q.new_empty((*q.shape[:-1], v.shape[-1])), sums


@torch.library.custom_op("raytrain_adv::flash_attn_4_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    sums: Tensor,
    bounds: Tensor | None,
    longest: int | None,
    scale: float | None,
    window: int | None,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values."""
    from flash_attn.cute.interface import _flash_attn_bwd

    dq, dk, dv = _flash_attn_bwd(
        *(q, k, v, output, gradient.contiguous(), sums),
        **_arguments(bounds, longest, scale, window, softcap),
    )
    return dq, dk, dv


@_backward.register_fake
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *_others: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _arguments(
    bounds: Tensor | None,
    longest: int | None,
    scale: float | None,
    window: int | None,
    softcap: float,
) -> dict[str, Any]:
    return {
        "cu_seqlens_q": bounds,
        "cu_seqlens_k": bounds,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
        "softmax_scale": scale,
        "causal": True,
        "window_size_left": window,
        "window_size_right": None if window is None else 0,
        "softcap": softcap,
    }


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bounds, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, bounds)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, gradient: Tensor, _sums: Tensor | None) -> tuple[Tensor | None, ...]:
    *saved, bounds = ctx.saved_tensors
    return *_backward(gradient, *saved, bounds, *ctx.options), None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Return causal attention [sequences, time, heads, features] of inputs of that layout."""
    window = None if window_size is None else window_size[0]
    output: Tensor = _forward(q, k, v, None, None, softmax_scale, window, softcap)[0]
    return output


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Return causal attention of sequences laid end to end, [tokens, heads, features], which begin
    and end at `cu_seqlens_q`, int32 [sequences + 1].
    """
    window = None if window_size is None else window_size[0]
    bounds, longest = cu_seqlens_q, max_seqlen_q
    output: Tensor = _forward(q, k, v, bounds, longest, softmax_scale, window, softcap)[0]
    return output
