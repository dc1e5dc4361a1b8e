"""How many steps a run has, and at which of them something happens: pure arithmetic."""

import math
from dataclasses import dataclass
from typing import Literal

from raytrain_adv.config.job import JobConfig, num_passes, sharing
from raytrain_adv.errors import JobError

Strategy = Literal["no", "steps", "epoch"]


@dataclass(frozen=True)
class Arithmetic:
    """The run in numbers. Steps are optimizer steps; a finished step's number counts from 1."""

    num_sequences: int  # sequences of one epoch (after packing, without the held-out ones)
    world_size: int  # workers (ranks)
    micro_batch: int  # sequences per worker in one forward and backward pass
    accumulation_steps: int  # forward and backward passes per optimizer step
    global_batch: int  # sequences per optimizer step, over all workers
    total_steps: int  # optimizer steps of the run
    warmup_steps: int  # steps over which the learning rate rises
    save_strategy: Strategy  # when a checkpoint is written
    save_every: int  # steps between two checkpoints where save_strategy is steps, else 0
    eval_strategy: Strategy  # when the held-out rows are evaluated
    eval_every: int  # steps between two evaluations where eval_strategy is steps, else 0
    filled_sequences: int  # of the next epoch, to complete the last batch; 0 if max_steps counts

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every sequence was seen once; the last one may reach into the next epoch."""
        return math.ceil(self.num_sequences / self.global_batch)

    @property
    def total_sequences(self) -> int:
        """Sequences trained on over the whole run, repeated ones counted again."""
        return self.total_steps * self.global_batch

    @property
    def epochs(self) -> float:
        """Passes over the data in all."""
        return self.epoch_after(self.total_steps)

    def epoch_after(self, step: int) -> float:
        """Return the passes over the data that are behind the run after `step` steps."""
        return step * self.global_batch / self.num_sequences

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint follows step `step`; one ends the run unless the strategy is no."""
        is_due = step == self.total_steps or self._due(step, self.save_strategy, self.save_every)
        return is_due and self.save_strategy != "no"

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation follows step `step`; one always ends the run."""
        return step == self.total_steps or self._due(step, self.eval_strategy, self.eval_every)

    @property
    def num_saves(self) -> int:
        """Checkpoints written over the run."""
        no_saves = self.save_strategy == "no"
        return 0 if no_saves else self._num_due(self.save_strategy, self.save_every)

    @property
    def num_evals(self) -> int:
        """Evaluations over the run, where there are held-out rows."""
        return self._num_due(self.eval_strategy, self.eval_every)

    def _due(self, step: int, strategy: Strategy, every: int) -> bool:
        if strategy == "steps":
            return step % every == 0
        if strategy == "epoch":
            return self._finished_epochs(step) > self._finished_epochs(step - 1)
        return False

    def _num_due(self, strategy: Strategy, every: int) -> int:
        before_last = self.total_steps - 1
        if strategy == "steps":
            return before_last // every + 1
        if strategy == "epoch":
            # A step that ends several epochs (a batch larger than the data) is one occasion.
            return min(self._finished_epochs(before_last), before_last) + 1
        return 1

    def _finished_epochs(self, step: int) -> int:
        return step * self.global_batch // self.num_sequences


def resolve_arithmetic(job: JobConfig, num_sequences: int, world_size: int) -> Arithmetic:
    """Return a run's arithmetic. Raises JobError without sequences, or if the workers cannot share
    a step's passes.
    """
    if num_sequences < 1:
        fix = "check dataset, max_samples and val_size"
        raise JobError("There is nothing to train on", "0 training sequences", fix)
    train, output = job.train, job.output
    eval_steps = output.logging_steps if output.eval_steps is None else output.eval_steps
    passes, split = num_passes(job, world_size), job.parallel.sequence_parallel_size
    if world_size % split or passes % (world_size // split):
        each = f", {split} for each sequence" if split > 1 else ""
        raise JobError(
            "The workers cannot share the passes of a step equally",
            f"{passes} passes in a step, {world_size} workers{each}",
            f"numbers that work: {', '.join(map(str, sharing(job, max(passes, 1) * split)))}",
        )
    global_batch = train.per_device_train_batch_size * passes
    total_steps, filled = _length(job, num_sequences, global_batch)
    return Arithmetic(
        num_sequences=num_sequences,
        world_size=world_size,
        micro_batch=train.per_device_train_batch_size,
        accumulation_steps=passes * split // world_size,
        global_batch=global_batch,
        total_steps=total_steps,
        warmup_steps=_warmup(job, total_steps),
        save_strategy=output.save_strategy,
        save_every=_interval(output.save_strategy, output.save_steps, total_steps),
        eval_strategy=output.eval_strategy,
        eval_every=_interval(output.eval_strategy, eval_steps, total_steps),
        filled_sequences=filled,
    )


def _length(job: JobConfig, num_sequences: int, global_batch: int) -> tuple[int, int]:
    """Return the number of steps, and how many sequences of the next epoch fill the last one."""
    if job.train.max_steps > 0:
        return job.train.max_steps, 0
    wanted = max(_share_of(num_sequences, job.train.num_train_epochs), 1)
    total_steps = math.ceil(wanted / global_batch)
    return total_steps, total_steps * global_batch - wanted


def _warmup(job: JobConfig, total_steps: int) -> int:
    if job.train.warmup_ratio is not None:
        return _share_of(total_steps, job.train.warmup_ratio)
    return min(job.train.warmup_steps, total_steps)


def _share_of(count: int, share: float) -> int:
    """Return count x share, rounded up; the product's rounding noise is not rounded up."""
    return math.ceil(round(count * share, 6))


def _interval(strategy: Strategy, value: float, total_steps: int) -> int:
    if strategy != "steps":
        return 0
    return max(_share_of(total_steps, value), 1) if value < 1 else int(value)
