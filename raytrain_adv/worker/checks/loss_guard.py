"""A step whose loss is NaN, infinite or has exploded: its batch is kept, and its update is left out
or the run stops.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.batches.loader import Batches
from raytrain_adv.data.tokens.tokenizer import load_tokenizer
from raytrain_adv.errors import StorageError, TrainingError
from raytrain_adv.run.run import Run
from raytrain_adv.storage.storage import Storage

FOLDER = "bad_batches"
BEFORE = 20
"""Losses whose median a step's is held against."""
ENOUGH = 5
"""Losses without which none is called exploded."""
IN_A_ROW = 10
"""Bad steps one after another that end the run: it would learn no more."""
MOST_KEPT = 20
"""Batches that are kept of a run; each may hold thousands of tokens."""


class LossGuard:
    """Judges each step by its loss and gradient norm, which are the same on all ranks.

    Args:
        job: says what is bad, and what is done then.
        run: this rank's run.
        batches: the training batches, of which the bad ones are kept.
        remedies: what the job's features suggest for an optimizer step.
    """

    def __init__(
        self,
        job: JobConfig,
        run: Run,
        batches: Batches,
        remedies: Callable[[int], tuple[str, ...]],
    ) -> None:
        self.job = job
        self.run = run
        self.batches = batches
        self.remedies = remedies
        self.skips = job.train.on_bad_loss == "skip"
        self.looks = self.skips or job.train.bad_loss_factor is not None
        """Whether a step is judged before its update; it waits for the GPU."""
        self.recent: list[float] = []
        """Losses per label token of the last good steps."""
        self.num_skipped = 0
        self.in_a_row = 0

    def must_skip(
        self, step: int, total: torch.Tensor, label_tokens: int, norm: torch.Tensor
    ) -> bool:
        """Whether the update of optimizer step `step` (from 0) is left out; all ranks know it.

        Raises:
            TrainingError: where a bad step ends the run, or too many have come in a row.
        """
        if not self.looks:
            return False
        loss = float(total) / max(label_tokens, 1)
        wrong = self._wrong(loss, float(norm))
        if not wrong:
            self.recent = [*self.recent, loss][-BEFORE:]
            self.in_a_row = 0
            return False
        kept = self.keep(step)
        if not self.skips:
            raise self._stop("The loss or the gradient norm is bad", step, f"{wrong}; {kept}")
        self.num_skipped += 1
        self.in_a_row += 1
        if self.in_a_row == IN_A_ROW:
            what = f"{IN_A_ROW} updates in a row had a bad loss and were skipped"
            raise self._stop(what, step, f"the last: {wrong}; {kept}")
        self.run.fault(f"step {step + 1}: {wrong}; its update was skipped; {kept}", step=step + 1)
        return True

    def _wrong(self, loss: float, norm: float) -> str:
        if not math.isfinite(loss) or not math.isfinite(norm):
            return f"loss {loss:.6g}, gradient norm {norm:.6g}"
        factor = self.job.train.bad_loss_factor
        if factor is None or len(self.recent) < ENOUGH:
            return ""
        usual = median(self.recent)
        if loss <= factor * usual:
            return ""
        return (
            f"loss {loss:.6g} is more than bad_loss_factor: {factor:g} times the median of the "
            f"{len(self.recent)} before it, {usual:.6g}"
        )

    def _stop(self, what: str, step: int, found: str) -> TrainingError:
        fix = (
            "look at the batch; lower learning_rate, add warmup_ratio, or set on_bad_loss: skip; "
            "the last checkpoint is intact (resume_from_checkpoint: true)"
        )
        fixes = "\n".join([*self.remedies(step), fix])
        return TrainingError(what, f"optimizer step {step + 1}: {found}", fixes)

    def keep(self, step: int) -> str:
        """Write the sequences of a step, of all workers, on rank 0; say where they are."""
        folder = Path(self.job.output.output_dir) / FOLDER
        path = folder / f"step_{step + 1:08d}.json"
        if not self.run.is_main:
            return f"its batch is in {path}"
        if len(list(folder.glob("step_*.json"))) >= MOST_KEPT and not path.exists():
            return f"its batch was not kept: {MOST_KEPT} are in {folder}"
        try:
            storage = Storage.at(str(folder))
            storage.make()
            storage.write_json(path.name, self._batch(step))
        except StorageError as error:  # the step is what there is to tell of
            return f"its batch could not be kept: {error.found}"
        return f"its batch is in {path}"

    def _batch(self, step: int) -> dict[str, Any]:
        tokenizer = load_tokenizer(self.job)
        arithmetic = self.batches.arithmetic
        of_a_rank = arithmetic.global_batch // self.run.world_size
        sequences = []
        for place, index in enumerate(self.batches.indices(step)):
            sequence = self.batches.data[int(index)]
            ids = [int(token) for token in sequence.input_ids]
            sequences.append(
                {
                    "sequence": int(index),
                    "rank": place // of_a_rank,
                    "text": str(tokenizer.decode(ids)),
                    "input_ids": ids,
                    "labels": [int(label) for label in sequence.labels],
                }
            )
        return {"step": step + 1, "sequences": sequences}
