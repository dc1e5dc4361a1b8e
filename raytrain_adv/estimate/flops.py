"""Model FLOPs per token of a training step, without recomputation.

    forward   2 x W                    each matrix element is multiplied and added once per token
    backward  2 x W (inputs' gradient) + 2 x W (weights' gradient; none for frozen weights)
    attention 12 x heads x (d_qk + d_v) / 2 x (keys a token attends to), summed over the layers

W counts the elements of every matrix that a token is multiplied with: the linears and the head,
tied to the embedding or not, but not the embedding, which is a lookup. Of a mixture only the active
experts count. Under a causal mask a token attends to T / 2 keys on average; with a sliding window
of w < T to w - w^2 / (2 T). Source: PaLM, https://arxiv.org/abs/2204.02311, appendix B, whose
attention term is twice this one: it ignores the causal mask.
"""

import re
from typing import cast

from torch import nn
from transformers import PretrainedConfig

from raytrain_adv.ops.bitsandbytes.experts import PackedStack
from raytrain_adv.ops.bitsandbytes.linear import PackedLinear
from raytrain_adv.ops.experts.find import active_expert_share, stacked

ROUTED_EXPERT = re.compile(r"\bexperts\.\d+\.")
WITHOUT_ATTENTION = ("linear_attention", "mamba", "conv", "recurrent")


def training_flops_per_token(model: nn.Module, seq_len: float) -> float:
    """Return the floating-point operations of forward and backward per token, of a model on any
    device, sharded or not. If sequences differ, `seq_len` is the mean over all tokens.
    """
    config = text_config(model)
    active = active_expert_share(config)
    flops = 0.0
    experts = stacked(model)
    for fqn, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        share = active if ROUTED_EXPERT.search(fqn) else 1.0
        if isinstance(module, PackedLinear | PackedStack):  # frozen, and packed
            used = active if isinstance(module, PackedStack) else share
            flops += module.in_features * module.out_features * used * 4
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if name.startswith("bias") or parameter.ndim not in (2, 3):
                continue
            if parameter.ndim == 3 and fqn not in experts:  # a convolution's
                continue
            used = active if parameter.ndim == 3 else share
            flops += parameter.numel() * used * (6 if parameter.requires_grad else 4)
    return flops + attention_flops_per_token(config, seq_len)


def attention_flops_per_token(config: PretrainedConfig, seq_len: float) -> float:
    """Return the operations of the attention products, forward and backward, over all layers."""
    types = getattr(config, "layer_types", None)
    each = layer_configs(config)
    return sum(
        _attention_flops(layer, seq_len, kind)
        for layer, kind in zip(each, types or [None] * len(each), strict=False)
    )


def layer_configs(config: PretrainedConfig) -> list[PretrainedConfig]:
    """Return the config of each layer: attributes of some models differ from layer to layer."""
    if getattr(config, "is_heterogeneous", False):
        return list(config.per_layer_config)
    return [config] * config.num_hidden_layers


def _attention_flops(config: PretrainedConfig, seq_len: float, kind: str | None) -> float:
    heads = getattr(config, "num_attention_heads", 0)
    if not heads or (kind is not None and kind.startswith(WITHOUT_ATTENTION)):
        return 0.0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    query_dim, value_dim = head_dim, getattr(config, "v_head_dim", None) or head_dim
    if getattr(config, "qk_nope_head_dim", None):  # multi-head latent attention
        query_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    # Mistral's window applies to every layer, unless the config has a switch for it.
    slides = getattr(config, "use_sliding_window", True) if kind is None else "sliding" in kind
    window = (getattr(config, "sliding_window", None) if slides else None) or seq_len
    return float(12.0 * heads * (query_dim + value_dim) / 2 * mean_keys(seq_len, window))


def mean_keys(seq_len: float, window: float) -> float:
    """Return the keys a token attends to on average, under a causal mask with a window."""
    window = min(window, seq_len)
    return window - window**2 / (2 * seq_len)


def text_config(model: nn.Module) -> PretrainedConfig:
    """Return the config of the model's language part."""
    return cast(PretrainedConfig, model.config).get_text_config()
