"""Sequences that several workers share: each computes a part of every one's tokens, and attends to
all of them with a part of the heads.

All else of a layer is of single tokens. Before attention the workers exchange tokens for heads, and
after it heads for tokens, so any attention of transformers computes as it does on one worker, with
the whole sequence's masks and bounds. Source: DeepSpeed-Ulysses, arXiv 2309.14509.
"""

import copy
import inspect
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_masks_for_generate
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from raytrain_adv.config.job import JobConfig
from raytrain_adv.errors import JobError
from raytrain_adv.model.attention import SPLIT, is_flash

WHOLE = "whole_position_ids"
"""Name among a model's inputs of the position ids [sequences, time] of all tokens of sequences, of
which the other inputs have this worker's; without it the inputs are whole."""
DYNAMIC_ROPE = ("dynamic", "longrope")


def refuse_unsplittable(job: JobConfig, model: PreTrainedModel) -> None:
    """Refuse a model of which workers would compute something else with a part of the tokens.
    Raises JobError, naming what it has.
    """
    size, config = job.parallel.sequence_parallel_size, model.config.get_text_config()
    if size == 1:
        return
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    heads = math.gcd(*(getattr(layer, "num_attention_heads", 0) for layer in layers))
    ropes = {str(kind) for m in model.modules() for kind in _rope_types(m)} & {*DYNAMIC_ROPE}
    takes = inspect.signature(type(model).forward).parameters
    reasons = {
        f"{size} workers cannot share its {heads} attention heads equally": heads % size != 0,
        "its forward pass takes no position_ids": "position_ids" not in takes,
        "its rotary embedding follows the longest position that a worker has (rope_type: "
        f"{', '.join(sorted(ropes))})": bool(ropes),
        "its attention counts positions from a worker's first token (attn_temperature_tuning)": (
            getattr(config, "attn_temperature_tuning", False)
        ),
        "its layers convolve over tokens": any(isinstance(m, nn.Conv1d) for m in model.modules()),
        "its routers' loss is of all tokens of a pass (output_router_logits)": getattr(
            config, "output_router_logits", False
        ),
    }
    good = [str(n) for n in range(1, heads + 1) if heads % n == 0]
    for reason in (reason for reason, holds in reasons.items() if holds):
        raise JobError(
            f"sequence_parallel_size: {size} is not possible with {type(model).__name__}",
            reason,
            f"choose one of {', '.join(good)}" if heads % size else "set sequence_parallel_size: 1",
        )


def _rope_types(module: nn.Module) -> tuple[Any, ...]:
    kinds = vars(module).get("rope_type", ())
    return tuple(kinds.values()) if isinstance(kinds, dict) else (kinds,)


def build_group(size: int, device: torch.device) -> dist.ProcessGroup:
    """Return this rank's group of `size` successive ranks, which share sequences."""
    shape = (dist.get_world_size() // size, size)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("sequences", "tokens"))
    return mesh.get_group("tokens")


def split_attention(model: PreTrainedModel, group: dist.ProcessGroup, dtype: torch.dtype) -> None:
    """Make a model attend over the group when its inputs have WHOLE; `dtype` is of activations.
    Raises JobError if its module has no attention function that could be called.
    """
    config = model.config.get_text_config()
    name = str(config._attn_implementation).removesuffix(SPLIT)
    attend = SplitAttention(group, name, config)
    masks = ALL_MASK_ATTENTION_FUNCTIONS
    ALL_ATTENTION_FUNCTIONS.register(name + SPLIT, attend)
    if name in masks:
        masks.register(name + SPLIT, masks[name])
    needs_masks = not is_flash(model)
    config._attn_implementation = name + SPLIT

    def take_whole(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """Note whether this worker has a part of the tokens, and make the whole's masks."""
        whole = given.pop(WHOLE, None)
        attend.is_split = whole is not None
        if whole is not None and needs_masks:
            shape = torch.empty((*whole.shape, 0), dtype=dtype, device=whole.device)
            given["attention_mask"] = create_masks_for_generate(
                model.config, shape, None, None, whole
            )
        return args, given

    model.register_forward_pre_hook(take_whole, with_kwargs=True)


@torch.library.custom_op("raytrain_adv::exchange", mutates_args=())
def exchange(x: Tensor, group: str) -> Tensor:
    """Send x[r] to rank r of the group of that name; return what each sent, [ranks, ...].

    On the current stream. Functional collectives have a stream of their own, and what they send
    and receive stays allocated until the GPU is there, many layers after the CPU.
    """
    c10d: Any = dist.distributed_c10d
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=c10d._resolve_process_group(group))
    return received


def _keep_group(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group = inputs[1]


def _exchange_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return exchange(gradient.contiguous(), ctx.group), None


exchange.register_fake(lambda x, group: torch.empty_like(x))
exchange.register_autograd(_exchange_gradient, setup_context=_keep_group)


class SplitAttention:
    """Attention in transformers' calling convention, over the workers that share a sequence."""

    def __init__(self, group: dist.ProcessGroup, name: str, config: PretrainedConfig) -> None:
        self.group, self.name = group, name
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.is_split = False
        """Whether inputs are parts; backward passes recompute with the last forward pass's."""
        self.config = copy.copy(config)
        """The model's, with the name of the attention that computes."""
        self.config._attn_implementation = name

    def _original(self, module: nn.Module) -> Callable[..., Any]:
        if self.name != "eager":
            found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[self.name]
            return found
        own: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
        return own

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Return attention's output [sequences, time, heads, features] of this worker's tokens.

        Query, key and value are [sequences, heads, time, features], with all heads of its tokens;
        `attention_mask` is of the whole sequences.
        """
        original = self._original(module)
        if not self.is_split:
            part = _Part(module, self.config, query.shape[1] // key.shape[1], None)
            return original(part, query, key, value, attention_mask, **others)[0], None
        num_heads, size = query.shape[1], self.size
        if num_heads % size:
            raise ValueError(f"a layer has {num_heads} attention heads")
        if others.get("position_bias") is not None:
            raise ValueError("its attention has a bias for each pair of tokens")
        own = slice(num_heads // size * self.rank, num_heads // size * (self.rank + 1))
        copies = math.lcm(key.shape[1], size) // key.shape[1]
        key, value = (x.repeat_interleave(copies, 1) if copies > 1 else x for x in (key, value))
        groups = num_heads // key.shape[1]
        query, key, value = (self._heads_for_tokens(x) for x in (query, key, value))
        others.pop("position_ids", None)  # of this worker's tokens; bounds and masks have the whole
        if others.get("s_aux") is not None:
            others["s_aux"] = others["s_aux"][own]
        part = _Part(module, self.config, groups, own)
        output = original(part, query, key, value, attention_mask, **others)[0]
        return self._tokens_for_heads(output), None

    def _heads_for_tokens(self, x: Tensor) -> Tensor:
        """[sequences, heads, part of time, features] -> [sequences, part of heads, time, ...]."""
        sequences, _, time, features = x.shape
        x = x.transpose(1, 2).reshape(sequences, time, self.size, -1, features)
        return self._exchange(x.movedim(2, 0)).movedim(0, 1).flatten(1, 2).transpose(1, 2)

    def _tokens_for_heads(self, x: Tensor) -> Tensor:
        """[sequences, time, part of heads, features] -> [sequences, part of time, heads, ...]."""
        x = x.reshape(len(x), self.size, -1, *x.shape[2:])
        return self._exchange(x.movedim(1, 0)).movedim(0, 2).flatten(2, 3)

    def _exchange(self, x: Tensor) -> Tensor:
        received: Tensor = exchange(x.contiguous(), self.group.group_name)
        return received


class _Part:
    """An attention module with the number of query heads to a key's, and a part of what it has for
    each head, as sinks.
    """

    def __init__(
        self, module: nn.Module, config: PretrainedConfig, groups: int, own: slice | None
    ) -> None:
        self._module, self._own = module, own
        self.config, self.num_key_value_groups = config, groups

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if isinstance(value, nn.Parameter) and self._own is not None:
            return value[self._own]
        return value
