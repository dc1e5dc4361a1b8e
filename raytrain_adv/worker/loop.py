"""The training loop: forward, backward, clip, step, and what happens between steps."""

from __future__ import annotations

import statistics
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from raytrain_adv.checkpoint.folders import Progress
from raytrain_adv.checkpoint.save import CheckpointWriter
from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.batches.loader import Batches, MicroBatch, Prefetcher, StepBatch
from raytrain_adv.errors import Stopped, Terminated, TrainingError
from raytrain_adv.ops.loss.function import loss_function
from raytrain_adv.run.run import Run
from raytrain_adv.run.schedule import Arithmetic
from raytrain_adv.transforms.applied import enabled
from raytrain_adv.worker.checks.convergence import Convergence
from raytrain_adv.worker.checks.gradients import FiniteWatch, clip, require_all_gradients
from raytrain_adv.worker.checks.loss_guard import LossGuard
from raytrain_adv.worker.checks.profile import Proof
from raytrain_adv.worker.checks.weights import bits_of, require_kept
from raytrain_adv.worker.evaluate import evaluate
from raytrain_adv.worker.metrics import Meter
from raytrain_adv.worker.optim import learning_rate, set_learning_rate

WARM_UP_STEPS = 3
"""Steps left out of medians: they compile, allocate and tune."""


class Loop:
    """One rank's training loop over a model, its optimizer and its batches."""

    def __init__(
        self,
        job: JobConfig,
        run: Run,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        arithmetic: Arithmetic,
        batches: Batches,
        held_out: Batches | None,
        proof: Proof,
    ) -> None:
        self.job = job
        self.run = run
        self.model = model
        self.optimizer = optimizer
        self.arithmetic = arithmetic
        self.batches = batches
        self.held_out = held_out
        self.proof = proof
        self.transforms = enabled(job)
        self.loss_sum = loss_function(model, job.parallel.torch_compile)
        self.guard = LossGuard(job, run, batches, self.remedies)
        self.finite = FiniteWatch(run.device, self.remedies, self.guard.keep)
        self.convergence = Convergence(self.transforms, run.say)
        self.meter = Meter(run, model, arithmetic, batches.data.attention_length(batches.neat))
        self.window = torch.zeros(2, dtype=torch.float64, device=run.device)
        """Loss and label tokens, summed over all workers since the last logging step."""
        self.num_tokens = 0
        self.gradients_seen = False
        """Whether every trainable parameter is known to get a gradient."""
        self.stop_wanted = False
        """Whether the run is to end after this step; all ranks know it in the same step."""
        self.told_to_end = False
        """Whether a worker's process was told to end; as above."""
        self.drained = False
        """Whether a node is about to be taken away, of which no checkpoint knows yet; as above."""
        self.evaluated: tuple[int, dict[str, Any]] = (-1, {})
        """The last evaluation: after how many steps, and what it gave."""

    def run_from(self, progress: Progress | None) -> None:
        """Train from the given progress, or from the start, to the last step."""
        first = 0
        if progress is not None:
            first, self.num_tokens = progress.step, progress.num_tokens
            self.window[0], self.window[1] = progress.window_loss, progress.window_tokens
            self.guard.num_skipped, self.guard.recent = progress.num_skipped, progress.recent
            self.guard.in_a_row = progress.skipped_in_a_row
        writer = CheckpointWriter(self.job, self.run, self.model, self.optimizer)
        prefetcher = Prefetcher(self.batches, first, self.arithmetic.total_steps, self.run.device)
        self.model.train()
        self.run.say("training", event="phase")
        self.meter.start()
        try:
            if first == 0 and not self.job.model.train_from_scratch:
                self.evaluate_variants(0)
            for step in range(first, self.arithmetic.total_steps):
                self.step(step, prefetcher, first_here=step == first)
                self.after(step + 1, prefetcher, writer)
                last = step + 1 == self.arithmetic.total_steps
                if (self.stop_wanted or self.told_to_end) and not last:
                    self.leave(step + 1, writer)
            with self.meter.paused("checkpoints"):
                writer.close()
            self.meter.stop()
        except torch.OutOfMemoryError as error:
            raise self.out_of_memory(error) from error
        finally:
            prefetcher.close()
            writer.memory.stop()
        self.switch_all_on()

    def leave(self, done: int, writer: CheckpointWriter) -> None:
        """End the run as it was asked to, with a checkpoint after `done` steps.

        Raises:
            Stopped: on all ranks, once the checkpoint is complete.
            Terminated: where a worker's process was told to end, not the run.
        """
        self.run.heartbeat.stop()
        again = "run again with resume_from_checkpoint: true to go on from "
        if self.job.output.save_strategy == "no":
            found, again = f"after step {done}; save_strategy: no, so that nothing is kept", ""
        else:
            self.run.say("saving a checkpoint before the run stops", event="phase")
            if not self.arithmetic.saves_after(done):
                self.finite.check()
                writer.save(self.progress(done), self.saved_metrics(done))
            writer.close()
            found, again = f"after step {done}, with a checkpoint", f"{again}step {done}"
        self.run.barrier()
        if not self.stop_wanted:
            raise Terminated("A worker was told to end, by SIGTERM", found, again)
        raise Stopped("The run was stopped", found, again)

    def switch_all_on(self) -> None:
        """Turn every feature on: what is evaluated, sampled and exported has them all."""
        for transform in self.transforms:
            transform.switch(self.model, True)

    def step(self, step: int, prefetcher: Prefetcher, first_here: bool) -> None:
        """Do one optimizer step (counted from 0)."""
        self.meter.begin(step)
        for transform in self.transforms:
            transform.begin_step(self.model, step)
        batch = prefetcher.next()
        label_tokens = self.global_label_tokens(batch)
        loss = torch.zeros((), dtype=torch.float32, device=self.run.device)
        # Where graphs are new; a later step runs the same.
        switched = [t for t in self.transforms if t.is_on(step) != t.is_on(step - 1)]
        for transform in switched:
            self.run.say(transform.switched(step), event="switch")
        weights = bits_of(self.model) if first_here or switched else None
        for micro_batch in batch.micro_batches:
            # Not in the first step, where compilation would be in the profile.
            with nullcontext() if first_here else self.proof.watching(step):
                loss += self.forward_backward(step, micro_batch, label_tokens)
        if weights is not None:
            require_kept(self.model, weights, self.run)
        total = self.over_workers(loss)
        if not self.gradients_seen and not (self.guard.skips and not torch.isfinite(total)):
            require_all_gradients(self.model, self.run, self.remedies(step))
            self.gradients_seen = True
        norm = clip(self.optimizer, self.job.train.max_grad_norm)
        if not self.guard.must_skip(step, total, label_tokens, norm):
            self.update(step)
            self.account(step, total, label_tokens, norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.meter.end(batch.num_tokens, norm)
        if first_here:
            self.meter.first_step_done()

    def update(self, step: int) -> None:
        """Change the parameters by their gradients, as optimizer step `step` (from 0)."""
        rate = learning_rate(self.job, self.arithmetic, step)
        set_learning_rate(self.optimizer.param_groups, rate)
        self.optimizer.step()
        for transform in self.transforms:
            transform.after_step(self.model)

    def forward_backward(self, step: int, batch: MicroBatch, label_tokens: int) -> torch.Tensor:
        """Return the micro-batch's summed loss; its gradients are added to the parameters'.

        Dropout is seeded by step and micro-batch: a resumed run draws the same, on any number of
        workers.
        """
        torch.manual_seed(hash((self.job.train.seed, step, batch.number)) & 0x7FFFFFFF)
        for transform in self.transforms:
            transform.begin_batch(self.model, step, batch.first, batch.segments)
        loss = self.loss_sum(self.model, batch.inputs, batch.labels)
        # FSDP2 averages gradients over the workers; the sum is wanted, over all label tokens.
        (loss * (self.run.world_size / max(label_tokens, 1))).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def global_label_tokens(self, batch: StepBatch) -> int:
        """Return the number of tokens with a loss over all workers; note whether to stop, and who
        is about to go.
        """
        reporter = self.run.reporter
        told = int(self.run.is_main and reporter.stop_requested())
        drained = reporter.drained()
        values = [
            batch.num_label_tokens,
            told,
            int(reporter.termination_requested()),
            int(bool(drained)),
        ]
        tokens, *asked = self.run.agree_all(values, dist.ReduceOp.SUM)
        self.stop_wanted, self.told_to_end, leaving = (count > 0 for count in asked)
        if leaving:
            self.drained = True
            said = next(filter(None, self.run.gather(drained)))
            self.run.fault(f"{said}: a checkpoint is made after this step")
        return tokens

    def over_workers(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the step's loss summed over all workers, without waiting for the GPU."""
        total = loss.double()
        if self.run.world_size > 1:
            dist.all_reduce(total)
        return total

    def account(
        self, step: int, total: torch.Tensor, label_tokens: int, norm: torch.Tensor
    ) -> None:
        """Add the step's loss to the window and watch for values that are not finite, without
        waiting for the GPU.
        """
        self.window[0] += total
        self.window[1] += label_tokens
        self.finite.see(step, total, norm)

    def after(self, done: int, prefetcher: Prefetcher, writer: CheckpointWriter) -> None:
        """Log, evaluate and save as the job asks for after `done` steps."""
        saves, evaluates = self.arithmetic.saves_after(done), self.evaluates_after(done)
        if done % self.job.output.logging_steps == 0 or done == self.arithmetic.total_steps:
            self.log(done, prefetcher)
        if evaluates:
            self.evaluate(done)
        self.evaluate_variants(done)
        with self.run.heartbeat.paused():
            writer.poll()
        if saves or (self.drained and self.job.output.save_strategy != "no"):
            self.finite.check()
            with self.meter.paused("checkpoints"):
                writer.save(self.progress(done), self.saved_metrics(done))
                if self.drained:  # there may be no later step to commit it
                    writer.finish()
        self.drained = False

    def saved_metrics(self, done: int) -> dict[str, float]:
        """Return what Ray is told with a checkpoint."""
        return {"step": float(done), "loss": self.meter.last_loss}

    def evaluates_after(self, done: int) -> bool:
        """Whether held-out rows are evaluated after `done` steps; the end of the run always is."""
        return self.held_out is not None and self.arithmetic.evaluates_after(done)

    def log(self, done: int, prefetcher: Prefetcher) -> None:
        """Write a line of metrics over the steps since the last one."""
        self.finite.check()
        loss_total, label_tokens = self.window.tolist()
        self.window.zero_()
        lr = learning_rate(self.job, self.arithmetic, done - 1)
        row = self.meter.row(done, loss_total, label_tokens, lr, prefetcher.waited_s)
        self.num_tokens += self.run.agree(self.meter.take_tokens(), dist.ReduceOp.SUM)
        row["num_tokens"] = self.num_tokens
        if self.guard.skips:
            row["num_skipped"] = self.guard.num_skipped
        self.run.write(row)
        if label_tokens:
            self.convergence.see(done, row["loss"])
        self.run.report(row, is_last=done == self.arithmetic.total_steps)

    def remedies(self, step: int) -> tuple[str, ...]:
        """Return what the job's features suggest where step `step` (from 0) went wrong."""
        return tuple(filter(None, (t.remedy(step) for t in self.transforms)))

    def evaluate(self, done: int) -> None:
        """Evaluate the held-out rows and write the result."""
        if self.held_out is None:
            return
        self.switch_all_on()
        result = self.held_out_loss(self.held_out)
        self.evaluated = (done, result)
        self.meter.eval_losses.append((done, result["loss"]))
        how = ", ".join(t.evaluated_as for t in self.transforms if t.evaluated_as)
        self.run.write({"kind": "eval", "step": done, **result, **({"how": how} if how else {})})

    def held_out_loss(self, rows: Batches) -> dict[str, Any]:
        """Return loss and perplexity on held-out rows with the model as it is."""
        with self.meter.paused("evaluation"):
            size = self.job.train.per_device_eval_batch_size
            return evaluate(self.model, rows, size, self.loss_sum, self.run)

    def evaluate_variants(self, done: int, of: str = "") -> None:
        """Evaluate what transforms want to be measured by after `done` steps, and say it.

        Args:
            done: optimizer steps.
            of: whose weights these are, if not this run's.
        """
        if self.held_out is None:
            return
        for transform in self.transforms:
            variants = transform.variants(done, self.arithmetic.total_steps, of)
            for name, on in variants.items():
                transform.switch(self.model, on)
                known = on and not of and self.evaluated[0] == done
                result = self.evaluated[1] if known else self.held_out_loss(self.held_out)
                self.run.say(
                    f"{name} after {done} steps: held-out loss {result['loss']:.4f}, perplexity "
                    f"{result['perplexity']:.4g}",
                    event="variant",
                    transform=transform.name,
                    variant=name,
                    step=done,
                    loss=result["loss"],
                    perplexity=result["perplexity"],
                )

    def progress(self, done: int) -> Progress:
        """Return where the run stands after `done` steps."""
        loss, tokens = self.window.tolist()
        since_log = self.run.agree(self.meter.tokens_since_log, dist.ReduceOp.SUM)
        return Progress(
            step=done,
            global_batch=self.arithmetic.global_batch,
            num_sequences=self.arithmetic.num_sequences,
            num_tokens=self.num_tokens + since_log,
            window_loss=loss,
            window_tokens=tokens,
            num_skipped=self.guard.num_skipped,
            recent=self.guard.recent,
            skipped_in_a_row=self.guard.in_a_row,
        )

    def out_of_memory(self, error: torch.OutOfMemoryError) -> TrainingError:
        """Return the error that says at which step memory ran out and what would need less."""
        return TrainingError(
            "The GPU is out of memory",
            f"rank {self.run.rank}, {self.meter.where()}: {str(error).splitlines()[0]}",
            "see raytrain-adv plan for what needs how much; less is needed with a "
            "smaller per_device_train_batch_size or "
            "cutoff_len, gradient_checkpointing: full, optim: adamw_torch_8bit, more "
            "workers, or fsdp_cpu_offload: true",
        )

    def figures(self) -> dict[str, Any]:
        """Return the run's figures for the report."""
        steady = self.meter.step_seconds[WARM_UP_STEPS:] or self.meter.step_seconds
        rates = self.meter.rates[WARM_UP_STEPS:] or self.meter.rates
        rate = statistics.median(rates) if rates else None
        return {
            "steps": self.arithmetic.total_steps,
            "total_steps": self.arithmetic.total_steps,
            "epochs": self.arithmetic.epochs,
            "step_seconds": statistics.median(steady) if steady else None,
            "tokens_per_second_per_worker": rate,
            "mfu_bf16": self.meter.mfu(rate) if rate else None,
            "peak_memory_gib": self.meter.peak_over_ranks(),
            "skipped_steps": self.guard.num_skipped,
            "data_wait_seconds": statistics.median(self.meter.waits) if self.meter.waits else None,
        }
