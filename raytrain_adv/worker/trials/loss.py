"""Before training: the loss inside the head against the loss of plain logits, on this device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.dtensor import local_part
from raytrain_adv.errors import TrainingError
from raytrain_adv.model.parallel import compute_dtype
from raytrain_adv.ops.loss import IGNORE
from raytrain_adv.ops.loss.function import cross_entropy_sum
from raytrain_adv.ops.loss.head import (
    BACKENDS,
    HeadLoss,
    loss_in_head,
    loss_of,
    remove,
    takes_labels,
)
from raytrain_adv.run.run import Run
from raytrain_adv.transforms.loss_kernel import LossKernel
from raytrain_adv.transforms.transform import Plan

NUM_TOKENS = 64
"""Tokens of the check: as many as FP8 products take, and a fraction of a step."""
ALLOWED = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (1e-2, 5e-2)}
"""Dtype -> how far loss and gradients may lie apart, relative: some roundings of that dtype."""


@dataclass(frozen=True)
class _Seen:
    """One pass: the loss, and the gradients of what goes into the head and of its parameters."""

    loss: float
    gradients: dict[str, torch.Tensor]


def check_loss(
    job: JobConfig, model: PreTrainedModel, run: Run, plans: Mapping[str, Plan]
) -> dict[str, Plan]:
    """Compare loss and gradients of the head on a few tokens; return the plans with what was found.

    Every rank calls this, after the weights are there. Gradients are cleared afterward. Where
    loss_kernel: auto chose the kernel and it is not right for this model or device, torch's loss is
    used, and the plan says so.

    Raises:
        TrainingError: on all ranks, where they differ by more than rounding, or the kernel does not
            run on one of them.
    """
    if not takes_labels(model):
        return dict(plans)
    # transformers leaves this method without types.
    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    loss = loss_of(head)
    assert loss is not None  # takes_labels: both are installed together
    failed = _failure(loss, run.device, compute_dtype(job))
    if run.agree(int(bool(failed)), dist.ReduceOp.MAX):
        refusal = TrainingError(
            f"The loss of {loss.kernel} does not run here",
            failed or "it fails on another rank; see its error",
            "mend what it says is missing, or set loss_kernel: torch",
        )
        return _left_to_torch(job, model, head, run, plans, refusal)
    with run.phase("check the loss"), _quiet(model):
        plain = _pass(model, head, run, in_head=False)
        ours = _pass(model, head, run, in_head=True)
    dtype = torch.bfloat16 if _computes_in_half(plain) else torch.float32
    loss_allowed, gradient_allowed = ALLOWED[dtype]
    apart = _apart(ours, plain)
    wrong = [
        f"{name}: {value:.2%} apart"
        for name, value in apart.items()
        if not value <= (loss_allowed if name == "loss" else gradient_allowed)
    ]
    if run.agree(int(bool(wrong)), dist.ReduceOp.MAX):
        found = "\n".join(wrong or ["on another rank; see its error"])
        refusal = TrainingError(
            f"The loss of {loss.kernel} is not the model's own",
            f"{found}\n(loss {ours.loss:.5f} in the head, {plain.loss:.5f} of its logits, on "
            f"{NUM_TOKENS} tokens, rank {run.rank})",
            "set loss_kernel: torch; a model that changes its logits after the head, by a key that "
            "is not known here, needs it",
        )
        return _left_to_torch(job, model, head, run, plans, refusal)
    worst = max(v for k, v in apart.items() if k != "loss")
    sentence = (
        f"checked on {NUM_TOKENS} tokens before training: loss {ours.loss / NUM_TOKENS:.5f}, "
        f"{plain.loss / NUM_TOKENS:.5f} of plain logits; gradients of the head and its input "
        f"{worst:.2%} apart, {gradient_allowed:.1%} allowed"
    )
    run.say(sentence)
    return {
        name: replace(plan, notes=(*plan.notes, sentence)) if name == "loss_kernel" else plan
        for name, plan in plans.items()
    }


def _apart(ours: _Seen, plain: _Seen) -> dict[str, float]:
    """Return how far two passes' losses and gradients are apart, as shares of the plain one's."""
    loss = abs(ours.loss - plain.loss) / max(abs(plain.loss), 1e-6)
    gradients = {
        f"gradient of {name}": _distance(ours.gradients[name], plain.gradients[name])
        for name in plain.gradients
    }
    return {"loss": loss, **gradients}


def _failure(loss: HeadLoss, device: torch.device, dtype: torch.dtype) -> str:
    """Say why the chunked loss does not run on this device; empty where it does. It is tried on a
    few numbers, by each rank for itself: in the model the others would wait for the one that fails.
    """
    if loss.kernel != "chunked":
        return ""
    hidden, weight = (torch.zeros(n, 16, device=device, dtype=dtype) for n in (16, 32))
    labels = torch.zeros(16, device=device, dtype=torch.int64)
    try:
        BACKENDS[loss.kernel](hidden.requires_grad_(), weight, None, labels, loss.logit_map)
    except (RuntimeError, ImportError, OSError) as error:  # as Triton without a compiler
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return ""


def _left_to_torch(
    job: JobConfig,
    model: PreTrainedModel,
    head: nn.Module,
    run: Run,
    plans: Mapping[str, Plan],
    refusal: TrainingError,
) -> dict[str, Plan]:
    """Take torch's loss in the place of what auto chose, and say so.

    Raises:
        TrainingError: where the job itself asks for the kernel.
    """
    if not job.transform(LossKernel).is_auto:
        raise refusal
    remove(model, head)
    sentence = (
        f"loss_kernel: auto is torch after all: {refusal.what}: {refusal.found.splitlines()[0]}"
    )
    run.say(sentence)
    skipped = dict.fromkeys(plans["loss_kernel"].changes, "the loss is torch's after all")
    return {**plans, "loss_kernel": Plan("loss_kernel", skipped=skipped, notes=(sentence,))}


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Without dropout, and without compiling layers for so few tokens; no gradient stays."""
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        yield
    model.train()
    model.zero_grad(set_to_none=True)


def _pass(model: PreTrainedModel, head: nn.Module, run: Run, in_head: bool) -> _Seen:
    """Run one forward and backward pass and take the head's gradients off the model."""
    inputs, labels = _tokens(model, run.device)
    seen: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].requires_grad:
            args[0].retain_grad()
        seen.append(args[0])

    model.zero_grad(set_to_none=True)
    hook = head.register_forward_pre_hook(keep)
    if in_head:
        loss = loss_in_head(model, inputs, labels)
    else:
        logits = model(**inputs, use_cache=False).logits
        loss = cross_entropy_sum(logits.flatten(0, 1), labels.flatten())
    hook.remove()
    loss.backward()  # type: ignore[no-untyped-call] # torch leaves it so
    gradients = {
        name: local_part(p.grad).detach().float()
        for name, p in head.named_parameters()
        if p.grad is not None
    }
    if seen[0].grad is not None:
        gradients["its input"] = seen[0].grad
    return _Seen(loss.item(), gradients)


def _tokens(
    model: PreTrainedModel, device: torch.device
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the same few tokens on every rank, one label in eight left out."""
    vocab = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (1, NUM_TOKENS + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[:, ::8] = IGNORE
    return {"input_ids": ids[:, :-1].to(device)}, labels.to(device)


def _computes_in_half(seen: _Seen) -> bool:
    return seen.gradients["its input"].dtype in (torch.bfloat16, torch.float16)


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the norm of the difference over the norm, on this rank's part; 0 for an empty one."""
    if other.numel() == 0:
        return 0.0
    size = float(torch.linalg.vector_norm(other.float()))
    apart = float(torch.linalg.vector_norm(one.float() - other.float()))
    if size == 0.0:
        return 0.0 if apart == 0.0 else math.inf
    return apart / size
