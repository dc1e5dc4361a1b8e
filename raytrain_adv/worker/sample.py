"""Answers of the trained model to held-out prompts, made by all ranks in step, greedy."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from raytrain_adv.dtensor import reshard
from raytrain_adv.estimate.flops import text_config

BUCKET = 256
"""Prompt and answer are padded to a multiple of this: one shape, so one compiled graph."""


@torch.no_grad()
def greedy_answer(
    model: nn.Module, prompt: list[int], stop: set[int], device: torch.device, max_new_tokens: int
) -> list[int]:
    """Return the greedily decoded continuation of `prompt` (token ids), without the stop token; an
    empty one where the prompt leaves no position of the model free.

    Every rank must call this with the same prompt: each forward pass gathers sharded parameters.
    There is no cache of keys and values; causal attention makes the padding on the right harmless.
    """
    positions = getattr(text_config(model), "max_position_embeddings", None)
    if positions is not None:
        max_new_tokens = min(max_new_tokens, positions - len(prompt))
    if max_new_tokens < 1 or not prompt:
        return []
    model.eval()
    length = -(-(len(prompt) + max_new_tokens) // BUCKET) * BUCKET
    length = length if positions is None else min(length, positions)
    tokens = torch.full((1, length), prompt[-1], dtype=torch.long, device=device)
    tokens[0, : len(prompt)] = torch.tensor(prompt, device=device)
    end = len(prompt)
    for position in range(len(prompt), len(prompt) + max_new_tokens):
        logits = model(input_ids=tokens, use_cache=False).logits
        choice = logits[0, position - 1].argmax()
        if dist.is_initialized():  # other GPUs may round another way, and all have to go on alike
            dist.broadcast(choice, src=0)
        chosen = int(choice)
        if chosen in stop:
            break
        tokens[0, position] = chosen
        end = position + 1
    model.train()
    reshard(model)
    answer: list[int] = tokens[0, len(prompt) : end].tolist()
    return answer
