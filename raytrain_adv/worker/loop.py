"""The training loop's state, one step, and what happens between steps: logs, saves, evaluation."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import InitVar, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from raytrain_adv.checkpoint.folders import Progress
from raytrain_adv.checkpoint.save import CheckpointWriter
from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.batches.loader import (
    Batches,
    MicroBatch,
    Prefetcher,
    StepBatch,
)
from raytrain_adv.errors import Stopped, Terminated, TrainingError
from raytrain_adv.estimate.launches import why_no_graph
from raytrain_adv.ops.loss.function import LossFunction, loss_function
from raytrain_adv.run.run import Run
from raytrain_adv.run.schedule import Arithmetic
from raytrain_adv.text import first_line
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.worker.checks.step import Checks, clip
from raytrain_adv.worker.compile_cache import found_compiled
from raytrain_adv.worker.evaluation import (
    evaluate_held_out,
    evaluate_variants,
    is_best,
    is_enough,
)
from raytrain_adv.worker.graph import Passes
from raytrain_adv.worker.metrics import Meter
from raytrain_adv.worker.optim import Schedule, set_learning_rate


@dataclass(eq=False)
class TrainState:
    """What one rank trains, and how far it is; `progress` is that of the resumed checkpoint."""

    job: JobConfig
    run: Run
    transforms: Transforms
    model: nn.Module
    optimizer: torch.optim.Optimizer
    arithmetic: Arithmetic
    batches: Batches
    held_out: Batches | None
    held_out_each: dict[str, Batches]
    """The same rows by dataset, with eval_on_each_dataset."""
    training_loss: LossFunction | None
    """The loss of a job that weighs tokens; none means the cross-entropy, as in evaluations."""
    progress: InitVar[Progress | None]
    first_step: int = 0  # the first step of this attempt, from 0
    num_tokens: int = 0  # tokens over all workers up to the last logging step
    # All ranks learn these in the same step.
    stop_wanted: bool = False  # whether the run must end after this step
    must_end: bool = False  # whether a worker's process received SIGTERM
    draining: bool = False  # whether a node is being drained and no checkpoint was made since
    evaluated: tuple[int, dict[str, Any]] = (-1, {})
    """The last evaluation: after how many steps, and its result."""

    def __post_init__(self, progress: Progress | None) -> None:
        """Start reading batches."""
        self.evaluations = {} if progress is None else dict(progress.evaluations)
        """Step -> what its evaluation found."""
        losses = (found["loss"] for found in self.evaluations.values())
        self.schedule = Schedule(self.job, self.arithmetic, losses)
        compiled = self.job.parallel.torch_compile
        loss_sum = self.training_loss or loss_function(self.model, compiled)
        self.eval_loss_sum = loss_function(self.model, compiled)
        attended = self.batches.data.attention_length(self.batches.neat)
        self.meter = Meter(self.run, self.model, self.arithmetic, attended)
        self.passes = Passes(self.job, self.run, self.model, loss_sum)
        tokens, workers = self.batches.pass_tokens, self.run.world_size
        self.passes.allow(why_no_graph(self.model, self.job, workers, tokens))
        self.window = torch.zeros(2, dtype=torch.float64, device=self.run.device)
        """Loss and label tokens, summed over all workers since the last logging step."""
        if progress is not None:
            self.first_step, self.num_tokens = progress.step, progress.num_tokens
            self.window[0], self.window[1] = progress.window_loss, progress.window_tokens
        self.writer = CheckpointWriter(self.job, self.run, self.model, self.optimizer)
        last = self.arithmetic.total_steps
        self.prefetcher = Prefetcher(self.batches, self.first_step, last, self.run.device)


@contextmanager
def training(state: TrainState) -> Iterator[None]:
    """Time the steps inside, and wait for the last checkpoint at their end. Raises TrainingError
    when the GPU runs out of memory, naming the step.
    """
    state.model.train()
    state.run.say("training", event="phase")
    state.meter.start()
    try:
        yield
        with state.meter.paused("checkpoints"):
            state.writer.close()
        state.meter.stop()
    except torch.OutOfMemoryError as error:
        raise out_of_memory(state, error) from error
    finally:
        state.passes.close()
        state.prefetcher.close()
        state.writer.memory.stop()
    # Samples and the export use every feature.
    state.transforms.switch(state.model, True)


def train_step(state: TrainState, checks: Checks, step: int) -> None:
    """Do optimizer step `step` (from 0)."""
    is_first = step == state.first_step
    state.meter.step = step
    state.transforms.begin_step(state.model, step)
    batch = state.prefetcher.next()
    label_tokens = exchange(state, batch)
    loss = torch.zeros((), dtype=torch.float32, device=state.run.device)
    checks.before_step(step, is_first)
    for micro_batch in batch.micro_batches:
        with checks.profile(step) as profiled:
            loss += forward_backward(state, step, micro_batch, label_tokens, bool(profiled))
    checks.after_backward()
    total = loss.double()
    if state.run.world_size > 1:
        dist.all_reduce(total)
    checks.before_clip(step, total)
    norm = clip(state.optimizer, state.job.train.max_grad_norm)
    if not checks.loss.must_skip(step, total, label_tokens, norm):
        set_learning_rate(state.optimizer.param_groups, state.schedule.rate(step))
        state.optimizer.step()
        state.transforms.after_step(state.model)
        state.window[0] += total
        state.window[1] += label_tokens
        checks.loss.note(step, total, norm)
    state.optimizer.zero_grad(set_to_none=True)
    state.meter.end(batch.num_tokens, norm)
    if is_first:
        state.meter.first_step_done()
        if found := found_compiled(state.job, state.run):
            state.run.say(f"compiled: {found}", event="compiled")


def exchange(state: TrainState, batch: StepBatch) -> int:
    """Return the step's label tokens over all workers; exchange the flags that end the run."""
    run, reporter = state.run, state.run.reporter
    stop = run.is_main and reporter.stop_requested()
    drained = reporter.drained()
    mine = [stop, reporter.termination_requested(), bool(drained)]
    values = [batch.num_label_tokens, *map(int, mine)]
    tokens, *flags = run.agree_all(values, dist.ReduceOp.SUM)
    state.stop_wanted, state.must_end, draining = (count > 0 for count in flags)
    if draining:
        state.draining = True
        reason = next(filter(None, run.gather(drained)))
        run.fault(f"{reason}: a checkpoint is made after this step")
    return tokens


def forward_backward(
    state: TrainState, step: int, batch: MicroBatch, label_tokens: int, is_profiled: bool
) -> torch.Tensor:
    """Return the micro-batch's summed loss; add its gradients to the parameters'."""
    # A resumed run draws the same dropout, on any number of workers.
    own = (state.batches.part,) if state.batches.part else ()  # of the tokens of the same sequences
    seed = hash((state.job.train.seed, step, batch.number, *own)) & 0x7FFFFFFF
    state.transforms.begin_batch(state.model, step, batch.first, batch.segments)
    # FSDP2 averages gradients over the workers; we need their sum over all label tokens.
    scale = state.run.world_size / max(label_tokens, 1)
    features = state.transforms.on_at(step)
    return state.passes(batch.inputs, batch.labels, scale, seed, features, is_profiled)


def log_and_save(state: TrainState, checks: Checks, done: int) -> bool:
    """Log, evaluate and save what is due after `done` steps; return whether the run continues.
    Raises Stopped on all ranks, if the run must stop before its end; Terminated on all ranks, if a
    process must end before the run does.
    """
    last = done == state.arithmetic.total_steps
    saves, strategy = state.arithmetic.saves_after(done), state.job.output.save_strategy
    logs = done % state.job.output.logging_steps == 0 or last
    if logs:
        log(state, checks, done)
    if state.held_out is not None and state.arithmetic.evaluates_after(done):
        evaluate_held_out(state, state.held_out, done)
        saves = is_best(state, done) or saves
        last = last or is_enough(state, done)
        if last and not logs:
            log(state, checks, done)
    evaluate_variants(state, done)
    if state.writer.pending is not None and state.arithmetic.saves_after(done + 1):
        with state.meter.paused("checkpoints"):  # a failure costs less than two intervals
            state.writer.finish()
    else:
        with state.run.heartbeat.paused():
            state.writer.poll()
    if saves or ((state.draining or last) and strategy != "no"):
        checks.loss.require_finite()
        with state.meter.paused("checkpoints"):
            save(state, checks, done)
            if state.draining:  # there may be no later step to commit it
                state.writer.finish()
    state.draining = False
    if (state.stop_wanted or state.must_end) and not last:
        leave(state, checks, done)
    return not last


def log(state: TrainState, checks: Checks, done: int) -> None:
    """Write a row of metrics over the steps since the last one."""
    checks.loss.require_finite()
    loss_total, label_tokens = state.window.tolist()
    state.window.zero_()
    lr = state.schedule.rate(done - 1)
    row = state.meter.row(done, loss_total, label_tokens, lr, state.prefetcher.waited_s)
    state.num_tokens += state.run.agree(state.meter.take_tokens(), dist.ReduceOp.SUM)
    row["num_tokens"] = state.num_tokens
    if checks.loss.skips:
        row["num_skipped"] = checks.loss.num_skipped
    state.run.write(row)
    if label_tokens:
        checks.rise.add(done, row["loss"])
        checks.learning.add(done, row)
    state.run.report(row, is_last=done == state.arithmetic.total_steps)


def save(state: TrainState, checks: Checks, done: int) -> None:
    """Start a checkpoint after `done` steps."""
    loss, tokens = state.window.tolist()
    since_log = state.run.agree(state.meter.tokens_since_log, dist.ReduceOp.SUM)
    progress = Progress(
        step=done,
        global_batch=state.arithmetic.global_batch,
        num_sequences=state.arithmetic.num_sequences,
        num_tokens=state.num_tokens + since_log,
        window_loss=loss,
        window_tokens=tokens,
        num_skipped=checks.loss.num_skipped,
        recent=checks.loss.recent,
        skipped_in_a_row=checks.loss.in_a_row,
        evaluations=state.evaluations,
    )
    state.writer.save(progress, {"step": float(done), "loss": state.meter.last_loss})


def leave(state: TrainState, checks: Checks, done: int) -> None:
    """End the run early, with a checkpoint after `done` steps. Raises Stopped on all ranks, once
    the checkpoint is complete; Terminated if it was a worker's process that must end, not the run.
    """
    state.run.heartbeat.stop()
    if state.job.output.save_strategy == "no":
        found, again = f"after step {done}; save_strategy: no, so there is no checkpoint", ""
    else:
        state.run.say("saving a checkpoint before the run stops", event="phase")
        if not state.arithmetic.saves_after(done):
            checks.loss.require_finite()
            save(state, checks, done)
        state.writer.close()
        found = f"after step {done}, with a checkpoint"
        again = f"run again with resume_from_checkpoint: true to continue from step {done}"
    state.run.barrier()
    if not state.stop_wanted:
        raise Terminated("A worker received SIGTERM", found, again)
    raise Stopped("The run was stopped", found, again)


def out_of_memory(state: TrainState, error: torch.OutOfMemoryError) -> TrainingError:
    """Return an error that names the step and what would need less memory."""
    return TrainingError(
        "The GPU is out of memory",
        f"rank {state.run.rank}, optimizer step {state.meter.step + 1}: {first_line(error)}",
        "see raytrain-adv plan for the memory of each part; less is needed with a smaller "
        "per_device_train_batch_size or cutoff_len, gradient_checkpointing: full, optim: "
        "adamw_torch_8bit, more workers, or fsdp_cpu_offload: true",
    )
