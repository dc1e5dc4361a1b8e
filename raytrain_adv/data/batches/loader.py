"""The micro-batches of each optimizer step: the same ones whatever the number of workers."""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.batches.collate import (
    Inputs,
    Way,
    collate,
    pad_to,
    part_of,
    tokens_not_padding,
    told,
)
from raytrain_adv.data.batches.order import global_batch
from raytrain_adv.data.batches.sequences import SequenceSet
from raytrain_adv.ops.loss import IGNORE
from raytrain_adv.ops.loss.routers import TOKENS
from raytrain_adv.run.schedule import Arithmetic


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass takes.

    inputs: input_ids [sequences, time] and, with neat_packing, position_ids of the same shape, for
    some models also the conversations' bounds (see Way) or which tokens are padding (see TOKENS);
    labels
    [sequences, time] are shifted already, -100 where no loss is taken.
    """

    number: int
    """Place among the step's micro-batches over all workers: seeds dropout, so that it does not
    depend on them.
    """
    inputs: Inputs
    labels: torch.Tensor
    num_tokens: int
    """Tokens without padding."""
    first: int
    """Place of its first sequence among the step's over all workers."""
    segments: tuple[tuple[int, ...], ...]
    """Tokens of the conversations in each sequence; padding follows them."""

    def on(self, device: torch.device) -> "MicroBatch":
        """Return it with its tensors on the device, copied without waiting for the copy."""
        if device.type == "cpu":
            return self
        inputs = {
            k: _copied(v, device) if isinstance(v, torch.Tensor) else v
            for k, v in self.inputs.items()
        }
        return replace(self, inputs=inputs, labels=_copied(self.labels, device))


def _copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class StepBatch:
    """One worker's share of an optimizer step."""

    micro_batches: list[MicroBatch]
    num_label_tokens: int
    """Tokens with a loss, over this worker's micro-batches."""
    num_tokens: int
    """Tokens without padding, over this worker's micro-batches."""


class Batches:
    """Cuts the global batch of each step into micro-batches and gives each rank its run of them.

    Micro-batch m of a step has the step's sequences [m * micro_batch, (m + 1) * micro_batch) and
    belongs to rank m // accumulation_steps: 1 worker x 4 passes, 2 x 2 and 4 x 1 make the same
    micro-batches. With sequence_parallel_size that many successive ranks have the same ones, of
    which each gets its part of the tokens, in order, and its part of the counts.
    """

    def __init__(
        self,
        job: JobConfig,
        data: SequenceSet,
        arithmetic: Arithmetic,
        rank: int,
        pad_token_id: int,
        way: Way = "positions",
        tells_padding: bool = False,
    ) -> None:
        self.data = data
        self.arithmetic = arithmetic
        self.seed = job.train.seed
        self.shuffle = not job.data.disable_shuffling
        self.neat = job.data.neat_packing
        self.way = way
        self.tells_padding = tells_padding
        self.pad_token_id = pad_token_id
        self.pad_to = pad_to(job)
        self.split = job.parallel.sequence_parallel_size
        self.part = rank % self.split
        self.first = rank // self.split * arithmetic.accumulation_steps

    @property
    def pass_tokens(self) -> int:
        """Tokens of the longest pass on a worker, with padding."""
        longest = self.pad_to.length(int(self.data.lengths.max()))
        return longest // self.split * self.arithmetic.micro_batch

    def indices(self, step: int) -> NDArray[np.int64]:
        """Return the sequences of step `step` (from 0), of all workers: [global batch]."""
        size, count = self.arithmetic.global_batch, len(self.data)
        return global_batch(step, size, count, self.seed, self.shuffle)

    def step(self, step: int) -> StepBatch:
        """Return this rank's micro-batches of optimizer step `step` (from 0), on the CPU."""
        a, indices = self.arithmetic, self.indices(step).tolist()
        batches = [
            self.micro_batch(number, indices[number * a.micro_batch : (number + 1) * a.micro_batch])
            for number in range(self.first, self.first + a.accumulation_steps)
        ]
        num_labels = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
        return StepBatch(batches, num_labels, sum(batch.num_tokens for batch in batches))

    def micro_batch(self, number: int, indices: list[int]) -> MicroBatch:
        """Return the sequences of these indices as padded tensors."""
        sequences = [self.data[i] for i in indices]
        tensors = collate(
            sequences, pad_token_id=self.pad_token_id, pad_to=self.pad_to, neat=self.neat
        )
        labels = tensors.pop("labels")
        if self.tells_padding:
            tensors[TOKENS] = tokens_not_padding(sequences, labels.shape[1])
        inputs: Inputs = told(tensors, self.way) if self.neat else {**tensors}
        segments = tuple(s.segments for s in sequences)
        if self.way in ("flat", "apart"):
            length = labels.shape[1]
            ends = [(*lengths, length - sum(lengths)) for lengths in segments]
            labels, segments = labels.reshape(1, -1), (tuple(n for end in ends for n in end),)
        num_tokens = [len(s.input_ids) for s in sequences]
        if self.split > 1:
            size = labels.shape[1] // self.split
            own = slice(self.part * size, (self.part + 1) * size)
            inputs, labels = part_of(inputs, own), labels[:, own].contiguous()
            num_tokens = [len(range(n)[own]) for n in num_tokens]
        return MicroBatch(
            number,
            inputs,
            labels,
            sum(num_tokens),
            number * self.arithmetic.micro_batch,
            segments,
        )


class Prefetcher:
    """Makes the next steps' batches in a thread while the current one is computed."""

    def __init__(
        self, batches: Batches, first: int, last: int, device: torch.device, ahead: int = 2
    ) -> None:
        self.queue: queue.Queue[StepBatch | BaseException] = queue.Queue(maxsize=ahead)
        self.device = device
        self.waited_s = 0.0
        """Seconds the training loop has waited for data so far."""
        self._stop = threading.Event()
        steps = range(first, last)
        self._thread = threading.Thread(target=self._fill, args=(batches, steps), daemon=True)
        self._thread.start()

    def _fill(self, batches: Batches, steps: range) -> None:
        try:
            for step in steps:
                if not self._put(batches.step(step)):
                    return
        except BaseException as error:  # noqa: BLE001 # handed to the training loop, which raises it
            self._put(error)

    def _put(self, item: StepBatch | BaseException) -> bool:
        while not self._stop.is_set():
            try:
                self.queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def next(self) -> StepBatch:
        """Return the next step's batch on the device; count the time waited for it."""
        start = time.perf_counter()
        item = self.queue.get()
        self.waited_s += time.perf_counter() - start
        if isinstance(item, BaseException):
            raise item
        return replace(item, micro_batches=[m.on(self.device) for m in item.micro_batches])

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        self._thread.join()


def eval_batches(
    batches: Batches, size: int, rank: int, world_size: int
) -> Iterator[MicroBatch | None]:
    """Yield this rank's evaluation micro-batches; None where only other ranks still have one."""
    total = len(batches.data)
    num_batches = -(-total // size)
    for first in range(0, num_batches, world_size):
        number = first + rank
        rows = list(range(number * size, min((number + 1) * size, total)))
        yield batches.micro_batch(number, rows) if rows else None
