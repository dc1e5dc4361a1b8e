"""The optimizer, and the learning rate: of most schedules a pure function of the step."""

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from raytrain_adv.config.job import JobConfig
from raytrain_adv.config.training import ADAPTIVE
from raytrain_adv.ops.adamw import ClippingAdamW
from raytrain_adv.ops.adamw_8bit import adamw_8bit
from raytrain_adv.run.schedule import Arithmetic
from raytrain_adv.transforms.lora import Lora
from raytrain_adv.transforms.modules import inner_matrices

RATIO = "lr_ratio"
"""Entry of a parameter group: its learning rate, divided by the schedule's."""


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


def build_optimizer(model: nn.Module, job: JobConfig) -> torch.optim.Optimizer:
    """Return the optimizer over the trainable parameters, without weight decay for biases and
    norms.
    """
    train = job.train
    options: dict[str, Any] = {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "eps": train.adam_epsilon,
    }
    if train.optim == "muon":
        matrices = inner_matrices(model)
        chosen = {id(p) for p in matrices}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
        inner = [{"params": matrices, "weight_decay": train.weight_decay}] if matrices else []
        return MuonWithAdamW(inner, list(_groups(others, train.weight_decay)), **options)
    groups = [
        {**group, RATIO: ratio}
        for ratio, parameters in job.transform(Lora).learning_rate_ratios(model).items()
        for group in _groups(parameters, train.weight_decay)
    ]
    if train.optim == "adamw_torch_8bit":
        return adamw_8bit(groups, **options)
    kind = ClippingAdamW if train.optim == "adamw_torch_fused" else torch.optim.AdamW
    return kind(groups, **options)


def _groups(parameters: list[nn.Parameter], weight_decay: float) -> Iterator[dict[str, Any]]:
    for is_matrix, decay in ((True, weight_decay), (False, 0.0)):
        if params := [p for p in parameters if (p.ndim >= 2) == is_matrix]:
            yield {"params": params, "weight_decay": decay}


def set_learning_rate(groups: Iterable[dict[str, Any]], value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in groups:
        rate = value * group.get(RATIO, 1.0)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _import_schedules() -> Any:
    """Return transformers' get_scheduler; without PEFT, if nothing has imported it yet."""
    # transformers 5.23 imports PEFT, and with it bitsandbytes, as trainer_utils is imported, for a
    # function of the Trainer's: a second of CPU in each worker. Remove when it no longer does.
    name, package = "transformers.trainer_utils", importlib.import_module("transformers")
    if {"peft", name}.isdisjoint(sys.modules):
        utils: Any = importlib.import_module("transformers.utils")
        importlib.import_module("transformers.trainer_pt_utils")  # by the schedules, unpatched
        is_available = utils.is_peft_available
        try:
            utils.is_peft_available = lambda: False
            importlib.import_module("transformers.optimization")
        finally:
            utils.is_peft_available = is_available
            # Who imports it later gets one that knows PEFT.
            if sys.modules.pop(name, None) is not None:
                delattr(package, name.rpartition(".")[2])
    from transformers import get_scheduler

    return get_scheduler


class Schedule:
    """The learning rate by transformers' schedule, whose optimizer is a stand-in.

    Adaptive schedules follow the losses given to `observe`, which checkpoints keep: the same losses
    make the same rate again.
    """

    def __init__(
        self, job: JobConfig, arithmetic: Arithmetic, losses: Iterable[float] = ()
    ) -> None:
        train, total = job.train, arithmetic.total_steps
        self.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=train.learning_rate)
        options: dict[str, Any] = dict(train.lr_scheduler_kwargs)
        warmup, kind = arithmetic.warmup_steps, train.lr_scheduler_type
        if kind == "warmup_stable_decay" and "num_decay_steps" not in options:
            options["num_decay_steps"] = max(1, round(0.1 * total))
        self.peak, self.is_adaptive = train.learning_rate, kind in ADAPTIVE
        if kind == "greedy":  # its own defaults would end far above a fine-tuning rate
            options = {"min_lr": 0.0, "max_lr": train.learning_rate, **options}
        self.scheduler = _import_schedules()(kind, self.optimizer, warmup, total, options)
        for loss in losses:
            self.observe(loss)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step (from 0)."""
        if self.is_adaptive:
            return float(self.optimizer.param_groups[0]["lr"])
        return float(self.peak * self.scheduler.lr_lambdas[0](step))

    def observe(self, loss: float) -> None:
        """Take the held-out loss of an evaluation."""
        if self.is_adaptive:
            self.scheduler.step(loss)
