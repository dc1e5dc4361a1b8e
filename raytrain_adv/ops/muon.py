"""Muon for the matrices inside the layers, AdamW for all other parameters, as one optimizer."""

from collections.abc import Callable
from typing import Any

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """torch.optim.Muon and torch.optim.AdamW over groups that one set of states belongs to.

    Momentum 0.95, Nesterov, five Newton-Schulz steps, and updates scaled to AdamW's size, so that
    learning rates of AdamW fit. Sharded matrices are gathered for their update.

    Source: LLaMA-Factory's third_party/muon, whose numbers these are.
    """

    def __init__(
        self, matrices: list[dict[str, Any]], others: list[dict[str, Any]], **adamw: Any
    ) -> None:
        muon: list[torch.optim.Optimizer] = (
            [torch.optim.Muon(matrices, lr=adamw["lr"], adjust_lr_fn="match_rms_adamw")]
            if matrices
            else []
        )
        rest = [torch.optim.AdamW(others, **adamw)] if others else []
        self.parts = [*muon, *rest]
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Do one step of both."""
        if closure is not None:
            raise ValueError("MuonWithAdamW takes no closure")
        groups = iter(self.param_groups)  # loading a state replaces them, and self.state
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state
            part.step()
