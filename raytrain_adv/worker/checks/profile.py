"""Check by a profile of one training step that enabled features really run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from raytrain_adv.errors import TrainingError
from raytrain_adv.run.run import Run
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.transform import Plan, Transform

MOST_KERNELS = 6
"""GPU kernels listed in the report, the longest-running ones."""


class ProfileCheck:
    """Profiles one forward and backward pass and compares it with what transforms planned.

    Args:
        run: this rank's run.
        transforms: the job's transforms.
        plans: what each transform changed.
    """

    def __init__(self, run: Run, transforms: Transforms, plans: Mapping[str, Plan]) -> None:
        self.run = run
        self.plans = plans
        self.pending = [t for t in transforms if t.proven_by]
        self.found: dict[str, dict[str, Any]] = {}
        """Transform -> operator, how often it ran in the pass, and the GPU kernels it launched."""

    @contextmanager
    def watch(self, step: int) -> Iterator[None]:
        """Profile the pass inside for features that are on and not yet proven.

        Args:
            step: optimizer step, from 0. A feature that begins with it is not profiled yet:
                compilation would be in the profile.

        Raises:
            TrainingError: on all ranks, when an operator ran less often than modules were changed.
        """
        due = [t for t in self.pending if t.is_on(step) and t.is_on(step - 1)]
        if not due:
            yield
            return
        activities = [ProfilerActivity.CPU]
        if self.run.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities, acc_events=True) as seen:
            yield
            if self.run.device.type == "cuda":
                torch.cuda.synchronize(self.run.device)
        for transform in due:
            self._compare(transform, seen)
            self.pending.remove(transform)

    def report_unproven(self) -> None:
        """Report the features that no step was profiled with, as the run was too short."""
        for transform in self.pending:
            self.run.say(
                f"{transform.name}: no step followed the first one with it, so none was profiled "
                f"for {transform.proven_by}; its modules are those that were planned"
            )

    def _compare(self, transform: Transform, seen: profile) -> None:
        events = seen.events()  # type: ignore[no-untyped-call] # torch.profiler has no types here
        calls = [e for e in events or () if e.name == transform.proven_by]
        kernels: dict[str, float] = {}
        for call in calls:
            for kernel in call.kernels:
                kernels[kernel.name] = kernels.get(kernel.name, 0.0) + kernel.duration
        longest = sorted(kernels, key=lambda name: -kernels[name])[:MOST_KERNELS]
        planned = len(self.plans[transform.name].changes)
        self.found[transform.name] = {
            "operator": transform.proven_by,
            "calls": len(calls),
            "modules": planned,
            "gpu_kernels": longest,
        }
        if self.run.agree(len(calls), dist.ReduceOp.MIN) < planned:
            raise TrainingError(
                f"{transform.name} was applied to the model but never executed",
                f"{transform.proven_by} ran {len(calls)} times in a training step on rank "
                f"{self.run.rank}, for {planned} modules",
                "something else computes these modules: switch off use_kernels, "
                "use_liger_kernel or flash_attn one by one, or report it with this job",
            )
