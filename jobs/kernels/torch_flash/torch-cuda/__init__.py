"""PyTorch's own FlashAttention-2 as an attention of the Hub: for packed rows, without a package."""

import torch


def _flash(q, k, v, bounds, longest, options):
    out, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        bounds,
        bounds,
        longest,
        longest,
        options.get("dropout_p", 0.0),
        options.get("causal", False),
        False,
        scale=options.get("softmax_scale"),
        window_size_left=options.get("window_size", (-1, -1))[0],
        window_size_right=options.get("window_size", (-1, -1))[1],
    )
    return out


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
    """Return attention over q, k and v, [batch, time, heads, features]."""
    options = {"dropout_p": dropout_p, "softmax_scale": softmax_scale, "causal": causal}
    return _flash(q, k, v, None, q.shape[1], {**options, "window_size": window_size})


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1),
):  # fmt: skip
    """Return attention over sequences in one row, [tokens, heads, features], by their bounds."""
    options = {"dropout_p": dropout_p, "softmax_scale": softmax_scale, "causal": causal}
    return _flash(q, k, v, cu_seqlens_q, max_seqlen_q, {**options, "window_size": window_size})
