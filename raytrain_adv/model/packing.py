"""Masks that keep packed conversations apart, for models that make theirs without position ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate


def hand_masks(model: PreTrainedModel, dtype: torch.dtype) -> RemovableHandle:
    """Have a model get its masks from outside if it is given position ids and no mask: one for each
    kind of its layers. `dtype` is that of activations.
    """

    def add(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        positions = given.get("position_ids")
        if positions is None or given.get("attention_mask") is not None:
            return None
        shape = torch.empty((*positions.shape, 0), dtype=dtype, device=positions.device)
        mask = create_masks_for_generate(model.config, shape, None, None, positions)
        return args, {**given, "attention_mask": mask}

    return model.register_forward_pre_hook(add, with_kwargs=True)
