"""Models that come with code of their own, to go wrong at a chosen place."""

from __future__ import annotations

import json
from pathlib import Path

MODULE = """
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
    num_passes = 0

    def forward(self, *args, **kwargs):
        trains = torch.is_grad_enabled()  # not in trials before training
        self.num_passes += trains
        here = trains and self.num_passes == {at_pass} and dist.get_rank() == {rank}
        {before}
        found = super().forward(*args, **kwargs)
        {after}
        return found
"""


def with_own_code(
    model: Path, *, before: str = "", after: str = "", rank: int = 0, at_pass: int = 0
) -> None:
    """Give a Llama's folder a forward of its own, for trust_remote_code.

    Args:
        model: the folder; it holds config.json.
        before: a statement before the forward pass; `here` is whether it is the chosen one.
        after: one after it; `found` is what it gave.
        rank: on which rank `here` is true.
        at_pass: in which of a process's training passes, counted from 1; 0 means in none.
    """
    code = MODULE.format(before=before or "pass", after=after or "pass", rank=rank, at_pass=at_pass)
    (model / "own.py").write_text(code)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (model / "config.json").write_text(json.dumps(config))
