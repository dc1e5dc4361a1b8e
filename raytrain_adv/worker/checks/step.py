"""All checks of a training step: its weights, gradients, loss, and by a profile its operators."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn, profiler
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from raytrain_adv.checkpoint.folders import Progress
from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.batches.loader import Batches
from raytrain_adv.dtensor import global_norm, local_part, reshard
from raytrain_adv.errors import TrainingError
from raytrain_adv.estimate.flops import text_config
from raytrain_adv.ops.adamw import ClippingAdamW
from raytrain_adv.run.run import Run
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.transform import Plan, Transform
from raytrain_adv.worker.checks.learning import LearningCheck
from raytrain_adv.worker.checks.loss_guard import LossGuard, LossRise, smaller_updates

MOST_KERNELS = 6  # GPU kernels listed in the report, the longest-running ones
CHUNK = 1 << 24  # weights summed at once; on a CPU they are converted first
USABLE, BROKEN, MISSING = 0, 1, 2  # what the gradient of a parameter is
NAMED = 8  # parameters named in a message, of each kind
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Checks:
    """Checks that each step (from 0) computes what the job enables, and that its loss is sound."""

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
        self.plans = plans
        self.loss = LossGuard(job, run, batches, transforms.remedies, progress)
        self.rise = LossRise(transforms.switchable, run.say)
        vocabulary, smaller = int(text_config(model).vocab_size), smaller_updates(job.train)
        self.learning = LearningCheck(vocabulary, run.say, smaller)
        self.unproven = [t for t in transforms if t.proven_by]
        """Features that no profiled pass ran yet."""
        self.proof: dict[str, dict[str, Any]] = {}
        """Transform -> operator, how often it ran in the pass, and the GPU kernels it launched."""
        self.gradients_seen = False  # whether every trainable parameter is known to get a gradient
        self.is_first = True
        self.weights: torch.Tensor | None = None
        """Fingerprint of the weights before the forward pass, in the steps that compare it."""

    def before_step(self, step: int, is_first: bool) -> None:
        """Report which transforms switch on or off in a step, perhaps the first of this attempt."""
        switched = self.transforms.switched_at(step)
        for sentence in switched:
            self.run.say(sentence, event="switch")
        self.is_first = is_first
        # Only where graphs are new; a later step runs the same code.
        self.weights = bits_of(self.model) if is_first or switched else None

    def profile(self, step: int) -> AbstractContextManager[bool | None]:
        """Profile the forward and backward pass inside for features that are on and not proven yet;
        give whether it does. Raises TrainingError on all ranks, when an operator ran less often
        than modules were changed.
        """
        # Not in the first step of a feature or an attempt: the profile would contain compilation.
        due = [t for t in self.unproven if t.is_on(step) and t.is_on(step - 1)]
        return nullcontext() if self.is_first or not due else self._profiled(due)

    @contextmanager
    def _profiled(self, due: list[Transform]) -> Iterator[bool]:
        on_gpu = self.run.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profiler.profile(activities=activities, acc_events=on_gpu) as seen:
            yield True
            if on_gpu:
                torch.cuda.synchronize(self.run.device)
        ran = kernels_by_call(seen, on_gpu)
        for transform in due:
            self._compare(transform, ran)
            self.unproven.remove(transform)

    def _compare(self, transform: Transform, ran: Mapping[str, list[list[Any]]]) -> None:
        proofs = []
        changes = self.plans[transform.name].changes.values()
        needed = Counter(change.proven_by or transform.proven_by for change in changes)
        for operator, planned in sorted(needed.items(), key=lambda n: n[0] != transform.proven_by):
            calls = ran.get(operator, [])
            kernels: Counter[str] = Counter()
            for kernel in (kernel for call in calls for kernel in call):
                kernels[kernel.name] += kernel.duration
            proofs.append(
                {
                    "operator": operator,
                    "calls": len(calls),
                    "modules": planned,
                    "gpu_kernels": [name for name, _ in kernels.most_common(MOST_KERNELS)],
                }
            )
            if self.run.agree(len(calls), dist.ReduceOp.MIN) < planned:
                raise TrainingError(
                    f"{transform.name} was applied to the model but never executed",
                    f"{operator} ran {len(calls)} times in a training step on rank "
                    f"{self.run.rank}, for {planned} modules",
                    "something else computes these modules: switch off use_kernels, "
                    "use_liger_kernel or flash_attn one by one, or report it with this job",
                )
        self.proof[transform.name] = {**proofs[0], **({"others": proofs[1:]} if proofs[1:] else {})}

    def finish(self, evaluations: Mapping[str, Mapping[str, float]]) -> None:
        """Report the features that no step was profiled with, as the run was too short, and whether
        the model has learned; `evaluations` maps steps to what the held-out rows showed.
        """
        for transform in self.unproven:
            self.run.say(
                f"{transform.name}: no step followed the first one with it, so none was profiled "
                f"for {transform.proven_by}; its modules are those that were planned"
            )
        self.learning.finish(evaluations)

    def after_backward(self) -> None:
        """Check that forward and backward passes left the weights unchanged. Raises TrainingError
        on all ranks, naming the parameters that changed.
        """
        if self.weights is not None:
            require_kept(self.model, self.weights, self.run)

    def before_clip(self, step: int, total: torch.Tensor) -> None:
        """Check once that every trainable parameter has a finite gradient. A bad `total` loss that
        will be skipped proves nothing. Raises TrainingError on all ranks, naming the parameters
        without.
        """
        if not self.gradients_seen and not (self.loss.skips and not torch.isfinite(total)):
            require_all_gradients(self.model, self.run, self.transforms.remedies(step))
            self.gradients_seen = True


@torch.no_grad()
def bits_of(model: nn.Module) -> torch.Tensor:
    """Return the sum of each parameter's bits on this rank (FSDP2's shards), read as integers:
    int64, on the CPU, in the order of named_parameters.
    """
    reshard(model)
    sums = [_bits(p).cpu() for p in model.parameters()]
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    local: Any = local_part(tensor).detach()  # mypy would know no __tensor_flatten__ on a Tensor
    if is_traceable_wrapper_subclass(local):
        names, _ = local.__tensor_flatten__()
        return torch.stack([_bits(getattr(local, name)) for name in names]).sum()
    numbers = local.contiguous().view(-1).view(INTEGERS[local.itemsize])
    total = torch.zeros((), dtype=torch.int64, device=local.device)
    for chunk in numbers.split(CHUNK):
        total += chunk.sum(dtype=torch.int64)
    return total


def kernels_by_call(seen: profiler.profile, on_gpu: bool) -> dict[str, list[list[Any]]]:
    """Return operator -> the GPU kernels of each of its calls.

    Without a GPU the profile's own records suffice: the events that torch makes of them in Python,
    to have kernels by operator, take a small model longer than its step.
    """
    found: dict[str, list[list[Any]]] = {}
    if on_gpu:
        for event in seen.events() or ():  # type: ignore[no-untyped-call] # torch.profiler has no types here
            found.setdefault(event.name, []).append(event.kernels)
        return found
    records = seen.profiler.kineto_results.events()  # type: ignore[union-attr] # set by the exit
    ends: dict[tuple[str, int], int] = {}
    for record in sorted(records, key=lambda one: one.start_ns()):
        call = record.name(), record.start_thread_id()
        if record.start_ns() >= ends.get(call, 0):  # not within a call of the same name
            ends[call] = record.end_ns()
            found.setdefault(record.name(), []).append([])
    return found


def require_kept(model: nn.Module, before: torch.Tensor, run: Run) -> None:
    """Compare the weights with `before`, which bits_of returned before the forward pass. Raises
    TrainingError on all ranks, naming the parameters that changed on any.
    """
    changed = on_any_rank(run, (bits_of(model) != before).to(torch.int64))
    wrong = [n for (n, _), one in zip(model.named_parameters(), changed, strict=True) if one]
    if wrong:
        counts = f"({len(wrong)} of {len(changed)} parameters, over all ranks)"
        raise TrainingError(
            "A forward and backward pass changed weights, which the optimizer alone may do",
            "\n".join([*wrong[:NAMED], counts]),
            "something overwrites them: set torch_compile: false, or switch off use_kernels "
            "and use_liger_kernel one by one; then report it with this job",
        )


def on_any_rank(run: Run, values: torch.Tensor) -> list[int]:
    """Return the largest of each value (on the CPU) over all ranks."""
    if run.world_size > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=run.cpu_group)
    found: list[int] = values.tolist()
    return found


def require_all_gradients(model: nn.Module, run: Run, remedies: tuple[str, ...] = ()) -> None:
    """Check after the first backward pass that every trainable parameter has a finite gradient;
    `remedies` are what the job's features suggest if one is not finite. Raises TrainingError on all
    ranks, naming the parameters without one on any rank; something cut the graph or overflowed.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    states = on_any_rank(run, torch.tensor([_state(p) for _, p in trained], dtype=torch.int64))
    missing, broken = (
        [name for (name, _), state in zip(trained, states, strict=True) if state == kind]
        for kind in (MISSING, BROKEN)
    )
    if not missing and not broken:
        return
    lines = [f"no gradient: {name}" for name in missing[:NAMED]]
    lines += [f"not finite: {name}" for name in broken[:NAMED]]
    counts = f"{len(missing)} without and {len(broken)} with a gradient that is not finite"
    fix = (
        "freeze these modules (adapters: take them out of lora_target), or switch off what "
        "replaced their forward pass; for values that are not finite lower learning_rate or use "
        "bf16: true"
    )
    raise TrainingError(
        "After the first backward pass, trainable parameters have no usable gradient",
        "\n".join([*lines, f"({counts}, of {len(trained)}, over all ranks)"]),
        "\n".join([*(remedies if broken else ()), fix]),
    )


def _state(parameter: nn.Parameter) -> int:
    gradient = parameter.grad
    if gradient is None:
        return MISSING
    local = local_part(gradient)
    return USABLE if not local.numel() or bool(torch.isfinite(local).all()) else BROKEN


def clip(optimizer: torch.optim.Optimizer, max_norm: float) -> torch.Tensor:
    """Scale all gradients, at the latest in the coming step, to a global norm of at most max_norm
    (0: do not). Return the norm before, a scalar on the device.
    """
    gradients = [
        p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    norm = global_norm(gradients)
    if max_norm <= 0:
        return norm
    # Source: torch.nn.utils.clip_grads_with_norm_, which scales in a separate pass.
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    factor = factor.to(local_part(gradients[0]).device)  # the CPU with fsdp_cpu_offload
    if isinstance(optimizer, ClippingAdamW):
        optimizer.clip_factor = factor
    else:
        torch._foreach_mul_([local_part(g) for g in gradients], factor)
    return norm
