"""All checks of a training step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from raytrain_adv.checkpoint.folders import Progress
from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.batches.loader import Batches
from raytrain_adv.run.run import Run
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.transform import Plan
from raytrain_adv.worker.checks.gradients import FiniteWatch, require_all_gradients
from raytrain_adv.worker.checks.loss_guard import LossGuard, LossRise
from raytrain_adv.worker.checks.profile import ProfileCheck
from raytrain_adv.worker.checks.weights import bits_of, require_kept


class Checks:
    """Checks that each step computes what the job enables, and that its loss is sound.

    Args:
        job: the resolved job.
        run: this rank's run.
        model: the model.
        transforms: the job's transforms.
        plans: what each transform changed.
        batches: the training batches.
        progress: of the checkpoint that the run resumes from.
    """

    def __init__(
        self,
        job: JobConfig,
        run: Run,
        model: nn.Module,
        transforms: Transforms,
        plans: Mapping[str, Plan],
        batches: Batches,
        progress: Progress | None,
    ) -> None:
        self.run = run
        self.model = model
        self.transforms = transforms
        self.loss = LossGuard(job, run, batches, transforms.remedies, progress)
        self.finite = FiniteWatch(run.device, transforms.remedies, self.loss.keep)
        self.rise = LossRise(transforms, run.say)
        self.profiles = ProfileCheck(run, transforms, plans)
        self.gradients_seen = False
        """Whether every trainable parameter is known to get a gradient."""
        self.is_first = True
        self.weights: torch.Tensor | None = None
        """Fingerprint of the weights before the forward pass, in the steps that compare it."""

    def before_step(self, step: int, is_first: bool) -> None:
        """Report which transforms switch on or off in optimizer step `step` (from 0).

        Args:
            step: the step.
            is_first: whether it is the first of this attempt.
        """
        switched = self.transforms.switched_at(step)
        for sentence in switched:
            self.run.say(sentence, event="switch")
        self.is_first = is_first
        # Only where graphs are new; a later step runs the same code.
        self.weights = bits_of(self.model) if is_first or switched else None

    def profile(self, step: int) -> AbstractContextManager[None]:
        """Profile the forward and backward pass inside, if some transform needs it."""
        # Not in the first step, or compilation would be in the profile.
        return nullcontext() if self.is_first else self.profiles.watch(step)

    def after_backward(self) -> None:
        """Check that forward and backward passes left the weights unchanged.

        Raises:
            TrainingError: on all ranks, naming the parameters that changed.
        """
        if self.weights is not None:
            require_kept(self.model, self.weights, self.run)

    def before_clip(self, step: int, total: torch.Tensor) -> None:
        """Check once that every trainable parameter has a finite gradient.

        Args:
            step: optimizer step, from 0.
            total: its summed loss; a bad one that will be skipped proves nothing.

        Raises:
            TrainingError: on all ranks, naming the parameters without.
        """
        if not self.gradients_seen and not (self.loss.skips and not torch.isfinite(total)):
            require_all_gradients(self.model, self.run, self.transforms.remedies(step))
            self.gradients_seen = True

    def must_skip(
        self, step: int, total: torch.Tensor, label_tokens: int, norm: torch.Tensor
    ) -> bool:
        """Return whether the step's update must be skipped because its loss is bad.

        Raises:
            TrainingError: if a bad step ends the run.
        """
        return self.loss.must_skip(step, total, label_tokens, norm)

    def after_step(self, step: int, total: torch.Tensor, norm: torch.Tensor) -> None:
        """Note whether loss and gradient norm are finite, without waiting for the GPU."""
        self.finite.add(step, total, norm)

    def require_finite(self) -> None:
        """Check that all steps so far had a finite loss and gradient norm.

        Raises:
            TrainingError: naming the first that had not.
        """
        self.finite.check()
