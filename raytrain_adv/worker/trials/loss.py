"""Compare the loss in the head with the loss of plain logits before training."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

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
    body_of,
    loss_head,
    loss_in_head,
    loss_of,
    remove,
    takes_labels,
)
from raytrain_adv.run.run import Run
from raytrain_adv.text import first_line, of_error
from raytrain_adv.transforms.loss_kernel import LossKernel, own_loss
from raytrain_adv.transforms.transform import Plan
from raytrain_adv.trial.compare import relative_errors
from raytrain_adv.worker.trials.packing import eager_eval

NUM_TOKENS = 64  # tokens of the trial, enough for products in 8 bits
LOSS = "loss"
ALLOWED = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (1e-2, 5e-2)}
"""Dtype -> largest relative error of loss and gradients: some roundings of that dtype."""


def check_loss(
    job: JobConfig, model: PreTrainedModel, run: Run, plans: Mapping[str, Plan]
) -> dict[str, Plan]:
    """Compare loss and gradients of the head on a few tokens; return the plans with the result.

    Every rank calls this once weights are loaded; gradients are cleared. If loss_kernel: auto chose
    a kernel that is wrong here, torch's loss is used instead, and the plan contains why. Raises
    TrainingError on all ranks, if they differ by more than rounding, or the kernel does not run on
    one of them.
    """
    head = loss_head(model)
    own = loss_of(head) if head is not None else None
    if head is None or own is None or not takes_labels(model):  # all or none is installed
        return dict(plans)
    failure = _try_kernel(own, run.device, compute_dtype(job))
    if run.agree(int(bool(failure)), dist.ReduceOp.MAX):
        refusal = TrainingError(
            f"The {own.kernel} loss does not run here",
            failure or "it fails on another rank; see its error",
            "install what is missing, or set loss_kernel: torch",
        )
        return _fall_back(job, model, head, run, plans, refusal)
    try:
        with run.phase("check the loss"), eager_eval(model):
            plain, input_dtype = _run(model, head, run, in_head=False)
            ours, _ = _run(model, head, run, in_head=True)
    except AssertionError as error:  # Reformer's backward pass has another form for evaluation
        what = f"The {own.kernel} loss cannot be tried"
        refusal = TrainingError(what, first_line(error), "set loss_kernel: torch")
        return _fall_back(job, model, head, run, plans, refusal)
    loss, plain_loss = ours[LOSS].item(), plain[LOSS].item()
    halved = input_dtype in (torch.bfloat16, torch.float16)
    loss_allowed, gradient_allowed = ALLOWED[torch.bfloat16 if halved else torch.float32]
    gradient_allowed = getattr(type(head), "gradients_off", gradient_allowed)
    # A model may call a part of its body past it (TrOCR): its output is then seen in one pass only.
    errors = relative_errors(*({k: one[k] for k in ours if k in plain} for one in (ours, plain)))
    wrong = [
        f"{name}: {error:.2%} apart"
        for name, error in errors.items()
        if not error <= (loss_allowed if name == LOSS else gradient_allowed)
    ]
    if run.agree(int(bool(wrong)), dist.ReduceOp.MAX):
        found = "\n".join(wrong or ["on another rank; see its error"])
        refusal = TrainingError(
            f"The {own.kernel} loss differs from the model's own",
            f"{found}\n(loss {loss:.5f} in the head, {plain_loss:.5f} of its logits, on "
            f"{NUM_TOKENS} tokens, rank {run.rank})",
            "set loss_kernel: torch; a model that changes its logits after the head by an unknown "
            "key needs it",
        )
        return _fall_back(job, model, head, run, plans, refusal)
    worst = max(error for name, error in errors.items() if name != LOSS)
    sentence = (
        f"checked before training on {NUM_TOKENS} random tokens, whose loss is high: "
        f"{loss / NUM_TOKENS:.5f}, torch's is {plain_loss / NUM_TOKENS:.5f}; gradients "
        f"{worst:.2%} apart, {gradient_allowed:.1%} allowed"
    )
    run.say(sentence)
    plan = plans["loss_kernel"]
    return {**plans, "loss_kernel": replace(plan, notes=(*plan.notes, sentence))}


def _try_kernel(loss: HeadLoss, device: torch.device, dtype: torch.dtype) -> str:
    """Return why the chunked loss does not run here, outside the model; empty if it does."""
    if loss.kernel != "chunked":
        return ""
    hidden, weight = (torch.zeros(n, 16, device=device, dtype=dtype) for n in (16, 32))
    labels = torch.zeros(16, device=device, dtype=torch.int64)
    try:
        BACKENDS[loss.kernel](hidden.requires_grad_(), weight, None, labels, loss.logit_map)
    except (RuntimeError, ImportError, OSError) as error:  # as Triton without a compiler
        return of_error(error)
    return ""


def _fall_back(
    job: JobConfig,
    model: PreTrainedModel,
    head: nn.Module,
    run: Run,
    plans: Mapping[str, Plan],
    refusal: TrainingError,
) -> dict[str, Plan]:
    """Use torch's loss instead of auto's choice; raise the refusal if the job names the kernel, or
    has a head with a loss of its own.
    """
    if not job.transform(LossKernel).is_auto:
        raise refusal
    if key := own_loss(head):
        raise TrainingError(refusal.what, refusal.found, f"set {key}: false")
    remove(model, head)
    sentence = (
        f"loss_kernel: auto is torch after all: {refusal.what}: {refusal.found.splitlines()[0]}"
    )
    run.say(sentence)
    skipped = dict.fromkeys(plans["loss_kernel"].changes, "the loss is torch's after all")
    return {**plans, "loss_kernel": Plan("loss_kernel", skipped=skipped, notes=(sentence,))}


def _run(
    model: PreTrainedModel, head: nn.Module, run: Run, in_head: bool
) -> tuple[dict[str, torch.Tensor], torch.dtype]:
    """Run one pass; return the loss with this rank's part of the gradients of the body's output and
    the head's parameters, and the output's dtype.
    """
    inputs, labels = _tokens(model, run.device)
    seen: list[torch.Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if output[0].requires_grad:
            output[0].retain_grad()
        seen.append(output[0])

    body = body_of(model) or model  # the head's loss is of its output
    model.zero_grad(set_to_none=True)
    hook = body.register_forward_hook(keep)
    if in_head:
        loss = loss_in_head(model, inputs, labels)
    else:
        logits = model(**inputs, use_cache=False).logits
        loss = cross_entropy_sum(logits.flatten(0, 1), labels.flatten())
    hook.remove()
    loss.backward()  # type: ignore[no-untyped-call] # torch has no types here
    results = {LOSS: loss.detach()} | {
        f"gradient of {name}": local_part(p.grad).detach().float()
        for name, p in head.named_parameters()
        if p.grad is not None
    }
    if seen and seen[0].grad is not None:
        results["gradient of the body's output"] = seen[0].grad
    return results, (seen or list(head.parameters()))[0].dtype


def _tokens(
    model: PreTrainedModel, device: torch.device
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the same few tokens on every rank, one label in eight ignored."""
    vocab = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (1, NUM_TOKENS + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[:, ::8] = IGNORE
    return {"input_ids": ids[:, :-1].to(device)}, labels.to(device)
