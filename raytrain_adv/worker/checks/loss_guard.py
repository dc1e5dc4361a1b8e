"""Watch the loss: skip or stop at a step whose loss is bad, and report a rise with a feature on."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from raytrain_adv.checkpoint.folders import Progress
from raytrain_adv.config.job import JobConfig
from raytrain_adv.config.training import TrainConfig
from raytrain_adv.data.batches.loader import Batches
from raytrain_adv.data.tokens.tokenizer import load_tokenizer
from raytrain_adv.errors import StorageError, TrainingError
from raytrain_adv.run.run import Run
from raytrain_adv.storage.storage import Storage
from raytrain_adv.transforms.transform import Switchable, title_of

FOLDER = "bad_batches"
BEFORE = 20  # good losses whose median a step's loss is compared with
ENOUGH = 5  # fewest good losses to compare with
IN_A_ROW = 10  # bad steps in a row that end the run: it learns nothing any more
MOST_KEPT = 20  # most batches kept per run; each may have thousands of tokens
NEVER = 2**62


def smaller_updates(train: TrainConfig) -> str:
    """Return which keys make updates smaller, without those that the job has."""
    has_warmup = train.warmup_ratio or train.warmup_steps
    return "lower learning_rate" + ("" if has_warmup else ", add warmup_ratio")


class LossGuard:
    """Judges each step by its loss and gradient norm, the same on all ranks; keeps bad batches."""

    def __init__(
        self,
        job: JobConfig,
        run: Run,
        batches: Batches,
        remedies: Callable[[int], tuple[str, ...]],
        progress: Progress | None = None,
    ) -> None:
        self.job = job
        self.run = run
        self.batches = batches
        self.remedies = remedies
        self.skips = job.train.on_bad_loss == "skip"
        self.is_active = self.skips or job.train.bad_loss_factor is not None
        """Whether steps are judged before their update, which waits for the GPU."""
        self.recent = progress.recent if progress is not None else []
        """Losses per label token of the last good steps."""
        self.num_skipped = progress.num_skipped if progress is not None else 0
        self.in_a_row = progress.skipped_in_a_row if progress is not None else 0
        self.first_bad = torch.full((), NEVER, dtype=torch.int64, device=run.device)
        """On the device, the first step whose loss or gradient norm was not finite."""

    def note(self, step: int, *values: torch.Tensor) -> None:
        """Note whether a step's loss and gradient norm are finite, without waiting for the GPU."""
        finite = torch.stack([torch.isfinite(v) for v in values]).all()
        self.first_bad = torch.where(finite, self.first_bad, self.first_bad.clamp(max=step))

    def require_finite(self) -> None:
        """Check that all values noted so far were finite. Raises TrainingError naming the first
        step with one that was not.
        """
        step = int(self.first_bad.item())
        if step != NEVER:
            raise self._stop(
                "The loss or the gradient norm is not finite",
                step,
                f"first at optimizer step {step + 1}; {self.keep(step)}",
                f"{smaller_updates(self.job.train)}, check the rows of that step",
            )

    def must_skip(
        self, step: int, total: torch.Tensor, label_tokens: int, norm: torch.Tensor
    ) -> bool:
        """Return whether to skip the update of optimizer step `step` (from 0), on all ranks alike.
        Raises TrainingError if a bad step ends the run, or too many came in a row.
        """
        if not self.is_active:
            return False
        loss = float(total) / max(label_tokens, 1)
        wrong = self._wrong(loss, float(norm))
        if not wrong:
            self.recent = [*self.recent, loss][-BEFORE:]
            self.in_a_row = 0
            return False
        kept = self.keep(step)
        if not self.skips:
            what, found = "The loss or the gradient norm is bad", f"{wrong}; {kept}"
            raise self._stop(what, step, f"optimizer step {step + 1}: {found}")
        self.num_skipped += 1
        self.in_a_row += 1
        if self.in_a_row == IN_A_ROW:
            what = f"{IN_A_ROW} updates in a row had a bad loss and were skipped"
            found = f"the last: {wrong}; {kept}"
            raise self._stop(what, step, f"optimizer step {step + 1}: {found}")
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

    def _stop(self, what: str, step: int, found: str, lower: str = "") -> TrainingError:
        lower = lower or f"inspect the batch; {smaller_updates(self.job.train)}"
        skip = "" if self.skips else ", or set on_bad_loss: skip"
        fix = f"{lower}{skip}; checkpoints before it are intact (resume_from_checkpoint: true)"
        return TrainingError(what, found, "\n".join([*self.remedies(step), fix]))

    def keep(self, step: int) -> str:
        """Write the sequences of a step, of all workers, on rank 0; return where, as a sentence."""
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
        except StorageError as error:  # the bad step is the news, not this
            return f"its batch could not be kept: {error.found}"
        return f"its batch is in {path}"

    def _batch(self, step: int) -> dict[str, Any]:
        tokenizer = load_tokenizer(self.job)
        split = self.batches.split
        per_rank = self.batches.arithmetic.global_batch * split // self.run.world_size
        indices = [int(index) for index in self.batches.indices(step)]
        sequences = [
            {
                "sequence": index,
                "rank": place // per_rank * split,
                "text": str(tokenizer.decode(sequence.input_ids.tolist())),
                "input_ids": sequence.input_ids.tolist(),
                "labels": sequence.labels.tolist(),
            }
            for place, index in enumerate(indices)
            for sequence in [self.batches.data[index]]
        ]
        return {"step": step + 1, "sequences": sequences}


WINDOW = 10  # logged losses in each of the two means that are compared
RISE = 1.1  # smallest ratio of the two means that is reported
ERRORS = 4.0
"""Standard errors that their difference must exceed: every window of a long run is a chance to
exceed three by noise alone."""


class LossRise:
    """Compares the mean loss since a feature began with that before, or its first losses."""

    def __init__(self, transforms: Iterable[Switchable], say: Callable[[str], None]) -> None:
        # The last losses without a feature (or the first with it), and the window with it.
        empty: deque[float] = deque(maxlen=WINDOW)
        self.watched: list[tuple[Switchable, deque[float], list[float]]] = [
            (transform, empty.copy(), []) for transform in transforms
        ]
        self.say = say

    def add(self, done: int, loss: float) -> None:
        """Take the loss logged after `done` steps; report a rise once for each feature."""
        for entry in list(self.watched):
            transform, before, since = entry
            is_first = transform.is_on(0) and len(before) < WINDOW
            if not transform.is_on(done - 1) or is_first:
                before.append(loss)
                continue
            since.append(loss)
            if len(since) < WINDOW:
                continue
            remedy = transform.remedy(done - 1)
            if remedy and has_risen(list(before), since):
                self.watched.remove(entry)
                self.say(
                    f"the loss has risen from {fmean(before):.4f} to {fmean(since):.4f} with "
                    f"{title_of(transform)}: {remedy}, or lower learning_rate"
                )
            since.clear()


def has_risen(before: Sequence[float], since: Sequence[float]) -> bool:
    """Return whether the mean of `since` is higher than that of `before` by more than noise."""
    if len(before) < ENOUGH or not all(map(math.isfinite, (*before, *since))):
        return False
    old, new = fmean(before), fmean(since)
    squares = sum((x - old) ** 2 for x in before) + sum((x - new) ** 2 for x in since)
    freedom = len(before) + len(since) - 2
    error = math.sqrt(squares / freedom * (1 / len(before) + 1 / len(since)))
    return new - old > ERRORS * error and new > RISE * old
