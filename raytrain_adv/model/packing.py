"""Masks that keep packed conversations apart, for models that make theirs without position ids."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, masking_utils
from transformers.masking_utils import create_masks_for_generate

from raytrain_adv.model.sequence_parallel import WHOLE


def hand_masks(model: PreTrainedModel, dtype: torch.dtype) -> RemovableHandle:
    """Give a model its masks from outside if it is given position ids and no mask: one for each
    kind of its layers, and positions from where it counts. `dtype` is that of activations.
    """
    first = first_position(model)

    def add(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        positions = given.get("position_ids")
        if positions is None or given.get("attention_mask") is not None or WHOLE in given:
            return None
        shape = torch.empty((*positions.shape, 0), dtype=dtype, device=positions.device)
        mask = create_masks_for_generate(model.config, shape, None, None, positions)
        return args, {**given, "attention_mask": mask, "position_ids": positions + first}

    return model.register_forward_pre_hook(add, with_kwargs=True)


def first_position(model: nn.Module) -> int:
    """Return the first position of a text: RoBERTa's table of positions begins with padding's."""
    tables = (m for name, m in model.named_modules() if name.endswith("position_embeddings"))
    padding = (getattr(table, "padding_idx", None) for table in tables)
    return next((index + 1 for index in padding if index is not None), 0)


@contextmanager
def known_unpacked(inputs: Mapping[str, Any]) -> Iterator[None]:
    """Have transformers not look for packed conversations where inputs bring no position ids: it
    would wait for the GPU in each forward pass, and in a CUDA graph build a mask for none.
    """
    if "position_ids" in inputs:
        yield
        return
    own: Any = masking_utils
    plain = own.find_packed_sequence_indices, own.is_tracing
    own.find_packed_sequence_indices = lambda position_ids: None
    own.is_tracing = lambda tensor=None: False
    try:
        yield
    finally:
        own.find_packed_sequence_indices, own.is_tracing = plain
