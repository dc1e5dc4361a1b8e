"""Evaluation of the held-out rows, and what follows from it: the best model, an early stop."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from raytrain_adv.checkpoint import save
from raytrain_adv.checkpoint.folders import all_folders, find
from raytrain_adv.data.batches.loader import Batches, MicroBatch, eval_batches
from raytrain_adv.dtensor import reshard
from raytrain_adv.errors import StorageError
from raytrain_adv.ops.loss import IGNORE, perplexity
from raytrain_adv.ops.loss.function import chunked_cross_entropy_sum
from raytrain_adv.storage.storage import Storage
from raytrain_adv.text import plural

if TYPE_CHECKING:
    from raytrain_adv.worker.loop import TrainState

EXACT = "exact_answers"
FIGURES = ("loss", "accuracy", EXACT)


def evaluate_held_out(state: TrainState, rows: Batches, done: int) -> None:
    """Evaluate the held-out rows with every feature on, and write the result."""
    state.transforms.switch(state.model, True)
    each = {name: evaluate(state, rows) for name, rows in state.held_out_each.items()}
    result = _together(each) if each else evaluate(state, rows)
    state.evaluated = (done, result)
    kept: dict[str, float] = {k: result[k] for k in ("loss", "accuracy") if k in result}
    state.evaluations[str(done)] = kept
    state.schedule.observe(result["loss"])
    how = state.transforms.evaluated_as()
    state.run.write({"kind": "eval", "step": done, **result, **({"how": how} if how else {})})


def evaluate_at_start(state: TrainState) -> None:
    """Evaluate the model before its first step: its variants, and the held-out rows on request."""
    if state.first_step != 0:
        return
    if not state.job.model.train_from_scratch:
        evaluate_variants(state, 0)
    if state.job.output.eval_on_start and state.held_out is not None:
        evaluate_held_out(state, state.held_out, 0)


def _together(each: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the result over all rows, followed by the figures of each dataset."""
    results = list(each.values())
    tokens = sum(one["num_label_tokens"] for one in results)
    whole: dict[str, Any] = {
        name: sum(one[name] * one["num_label_tokens"] for one in results) / max(tokens, 1)
        for name in ("loss", "accuracy")
        if name in results[0]
    }
    if EXACT in results[0]:
        answers = sum(one["num_answers"] for one in results)
        right = sum(one[EXACT] * one["num_answers"] for one in results)
        whole |= {EXACT: right / max(answers, 1), "num_answers": answers}
    whole |= {"perplexity": perplexity(whole["loss"]), "num_label_tokens": tokens}
    whole["seconds"] = sum(one["seconds"] for one in results)
    for dataset, one in each.items():
        whole |= {f"{name}/{dataset}": one[name] for name in FIGURES if name in one}
    return whole


@torch.no_grad()
def evaluate(state: TrainState, batches: Batches) -> dict[str, Any]:
    """Return {loss, perplexity, num_label_tokens, seconds}, and with compute_accuracy {accuracy,
    exact_answers, num_answers}, over all rows with the model as it is.

    Ranks without rows left still run the forward pass: FSDP2 gathers on all of them.
    """
    model, run = state.model, state.run
    size = state.job.train.per_device_eval_batch_size
    with state.meter.paused("evaluation"):
        start = time.perf_counter()
        model.eval()
        totals = torch.zeros(5, dtype=torch.float64, device=run.device)
        idle: MicroBatch | None = None
        split = batches.split
        for batch in eval_batches(batches, size, run.rank // split, run.world_size // split):
            idle = idle or batches.micro_batch(0, [0])
            found = _sums(state, (batch or idle).on(run.device))
            if batch is not None:
                totals += found
        model.train()
        reshard(model)
        if run.world_size > 1:
            dist.all_reduce(totals)
    loss_total, tokens, num_right, num_exact, answers = totals.tolist()
    loss = loss_total / max(tokens, 1.0)
    shares = {"accuracy": num_right / max(tokens, 1.0), EXACT: num_exact / max(answers, 1.0)}
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        **({**shares, "num_answers": int(answers)} if state.job.output.compute_accuracy else {}),
        "num_label_tokens": int(tokens),
        "seconds": time.perf_counter() - start,
    }


def _sums(state: TrainState, batch: MicroBatch) -> torch.Tensor:
    """Return a batch's sums [5]: loss, labels, and with compute_accuracy rightly predicted labels,
    exact answers and answers.
    """
    labels = batch.labels
    right = exact = answers = torch.zeros((), device=labels.device)
    if state.job.output.compute_accuracy:
        logits = state.model(**batch.inputs, use_cache=False).logits
        is_right = logits.argmax(-1) == labels
        right = is_right.sum()
        exact, answers = exact_answers(is_right, labels)
        loss = chunked_cross_entropy_sum(logits.flatten(0, 1), labels.flatten())
    else:
        loss = state.eval_loss_sum(state.model, batch.inputs, labels)
    count = (labels != IGNORE).sum()
    return torch.stack([one.double() for one in (loss, count, right, exact, answers)])


def exact_answers(
    is_right: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many answers (labels [batch, tokens] that follow each other) are right to their
    last token, and how many there are.

    Greedy decoding would give exactly these word for word: as long as it has chosen the reference's
    tokens, it sees what the model sees here.
    """
    counted = labels != IGNORE
    starts = counted.clone()
    starts[:, 1:] &= ~counted[:, :-1]
    numbers = starts.flatten().cumsum(0)
    wrong = torch.zeros(int(numbers.numel()) + 1, dtype=torch.bool, device=labels.device)
    wrong[numbers[(counted & ~is_right).flatten()]] = True
    answers = starts.sum()
    return answers - wrong.sum(), answers


def evaluate_variants(state: TrainState, done: int, of: str = "") -> None:
    """Evaluate the variants that transforms compare; `of` names another owner of the weights."""
    if state.held_out is None:
        return
    for transform in state.transforms.switchable:
        for name, on in transform.variants(done, state.arithmetic.total_steps, of).items():
            transform.switch(state.model, on)
            known = on and not of and state.evaluated[0] == done
            result = state.evaluated[1] if known else evaluate(state, state.held_out)
            exact = {EXACT: result[EXACT]} if EXACT in result else {}
            right = f", {result[EXACT]:.1%} of the answers exact" if exact else ""
            state.run.say(
                f"{name} after {done} steps: held-out loss {result['loss']:.4f}, perplexity "
                f"{result['perplexity']:.4g}{right}",
                event="variant",
                transform=transform.name,
                variant=name,
                step=done,
                loss=result["loss"],
                perplexity=result["perplexity"],
                **exact,
            )


def _best(state: TrainState) -> tuple[int, str, float]:
    """Return the first step with the best evaluation, and the metric and its value there; not the
    model before the first step, of which there is no checkpoint.
    """
    name = state.job.output.metric_for_best_model.removeprefix("eval_")
    sign = -1.0 if name == "accuracy" else 1.0
    found = {int(step): one[name] for step, one in state.evaluations.items() if int(step)}
    step = min(found, key=lambda step: sign * found[step])
    return step, name, found[step]


def is_best(state: TrainState, done: int) -> bool:
    """Whether the model after `done` steps must be kept, because it is the best so far."""
    if not state.job.output.load_best_model_at_end:
        return False
    state.writer.keep_step = _best(state)[0]
    return state.writer.keep_step == done


def is_enough(state: TrainState, done: int) -> bool:
    """Whether the run ends early: early_stopping_steps evaluations brought nothing better."""
    limit = state.job.output.early_stopping_steps
    best, name, value = _best(state)
    since = sum(int(step) > best for step in state.evaluations)
    if limit is None or since < limit or done == state.arithmetic.total_steps:
        return False
    state.run.say(
        f"stopping early after step {done}: {name} {value:.4f} of step {best} was the best, and "
        f"{since} evaluations since brought nothing better",
        event="early_stop",
        step=done,
        best_step=best,
    )
    return True


def restore_best(state: TrainState) -> None:
    """Load the weights of the best evaluation, if the job wants them and they are not the last.
    Raises StorageError when its checkpoint is no longer complete.
    """
    if not state.job.output.load_best_model_at_end or not state.evaluations:
        return
    best, name, value = _best(state)
    run, last = state.run, max(map(int, state.evaluations))
    sentence = (
        f"the model of step {best} is the best of {plural(len(state.evaluations), 'evaluation')}"
    )
    run.say(f"{sentence} ({name} {value:.4f})", event="best", step=best, metric=name, value=value)
    if best == last:
        return
    folders = all_folders(run.storage) if run.is_main else ()
    path = run.broadcast(next((f.root for step, _, f in folders if step == best), ""))
    found = find(Storage(run.storage.filesystem, path)) if path else None
    if found is None:
        raise StorageError(
            "The best model's checkpoint is not there",
            f"step {best}, in {run.storage.root}",
            "set load_best_model_at_end: false and resume to export the last step's model",
        )
    save.load(found, state.model)
    state.transforms.after_step(state.model)
