"""Forward and backward passes as CUDA graphs: one launch for what small models need thousands of.

A pass of a 135M model launches 1,500 kernels, which a GPU finishes before Python has launched them.
A recorded pass is replayed with new tokens in the same buffers. It is compared with the pass that
it was recorded from before any step uses it.
"""

import math
import time
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raytrain_adv.config.job import JobConfig, refuse_without_graph
from raytrain_adv.errors import TrainingError
from raytrain_adv.model.packing import known_unpacked
from raytrain_adv.model.parallel import compute_dtype
from raytrain_adv.ops.loss.function import LossFunction
from raytrain_adv.run.run import Run
from raytrain_adv.text import first_line, plural
from raytrain_adv.trial.compare import TOLERANCE, precision, relative_error

WARM_UP = 2
"""Passes of a kind that run as they are: they compile, tune and allocate."""
MOST_KINDS = 8
"""Kinds of passes that are recorded: lengths, and features on or off."""
Inputs = Mapping[str, Tensor | int]


@dataclass(eq=False)
class Recorded:
    """A recorded pass, and the buffers that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    labels: Tensor
    scale: Tensor
    loss: Tensor

    def replay(self, inputs: Inputs, labels: Tensor, scale: float) -> Tensor:
        """Add the gradients of these tokens to the buffers; return the summed loss."""
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                self.inputs[name].copy_(value)  # type: ignore[union-attr] # of the same kind
        self.labels.copy_(labels)
        self.scale.fill_(scale)
        self.graph.replay()
        return self.loss


class Passes:
    """Runs forward and backward passes, and records those that come again."""

    def __init__(self, job: JobConfig, run: Run, model: nn.Module, loss_sum: LossFunction) -> None:
        self.job, self.run, self.model, self.loss_sum = job, run, model, loss_sum
        self.tolerance = TOLERANCE[compute_dtype(job)]
        self.off = "not asked yet"
        """Why passes are not recorded; empty if they are."""
        self.seen: Counter[Hashable] = Counter()
        self.recorded: dict[Hashable, Recorded] = {}
        self.buffers: dict[nn.Parameter, Tensor] = {}
        """Gradients that recorded passes add to."""
        self.pool: Any = None
        self.features: tuple[bool, ...] = ()
        self.num_recorded = 0

    def allow(self, off: str) -> None:
        """Record passes from now on, unless there is a reason not to. Raises JobError if the job
        requires it.
        """
        self.off = off or ("" if self.run.device.type == "cuda" else "there is no GPU")
        refuse_without_graph(self.job, self.off)

    def __call__(
        self,
        inputs: Inputs,
        labels: Tensor,
        scale: float,
        seed: int,
        features: tuple[bool, ...],
        plain: bool,
    ) -> Tensor:
        """Add the gradients of `scale` times the loss; return the loss, a sum over label tokens.

        Args:
            inputs: of the model, each [sequences, time].
            labels: [sequences, time], next tokens or -100.
            scale: what the sum is multiplied with before backward.
            seed: of random values in the pass.
            features: which features that can be off are on.
            plain: whether to run as it is, for a profile.
        """
        torch.manual_seed(seed)
        if features != self.features:  # what is recorded computes without what is on now
            self.features = features
            self.recorded.clear()
        shapes = tuple((k, v.shape if isinstance(v, Tensor) else v) for k, v in inputs.items())
        kind = (features, shapes, labels.shape)
        if self.off or plain or (is_first := self._is_first()) is None:
            return self._run(inputs, labels, scale)
        if (found := self.recorded.get(kind)) is None:
            self.seen[kind] += 1
            if self.seen[kind] <= WARM_UP or not is_first or len(self.recorded) == MOST_KINDS:
                return self._run(inputs, labels, scale)
            return self._record(kind, inputs, labels, scale, seed)
        if is_first:
            self._attach()
        return found.replay(inputs, labels, scale)

    @property
    def summary(self) -> str:
        """What the report says of them."""
        if not self.num_recorded:
            return f"passes are not recorded: {self.off or 'none came often enough'}"
        return f"{plural(self.num_recorded, 'kind')} of passes recorded and replayed"

    def close(self) -> None:
        """Give back the memory of recorded passes."""
        self.recorded.clear()
        self.buffers, self.pool = {}, None

    def _run(self, inputs: Inputs, labels: Tensor, scale: float | Tensor) -> Tensor:
        with known_unpacked(inputs):
            loss = self.loss_sum(self.model, inputs, labels)
        if not loss.requires_grad:
            raise TrainingError(
                "No gradient reaches any parameter",
                f"{type(self.model).__name__}'s loss does not depend on one that is trained",
                "train other parameters (finetuning_type, lora_target, freeze_trainable_layers); "
                "models that compute backward themselves (Reformer) train in full alone",
            )
        try:
            (loss * scale).backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            if "same dtype" not in str(error):
                raise
            raise TrainingError(
                f"The backward pass of {type(self.model).__name__} fails in "
                + precision(compute_dtype(self.job)),
                first_line(error),
                "set bf16: false; models that compute backward themselves (Reformer) read float32 "
                "parameters there",
            ) from error
        return loss.detach()

    def _is_first(self) -> bool | None:
        """Whether no pass of the step has run; None if one ran whose gradients are elsewhere."""
        gradients = (p.grad for p in self.buffers or self.model.parameters() if p.requires_grad)
        gradient = next(gradients, None)
        if gradient is None:
            return True
        return False if gradient is next(iter(self.buffers.values()), None) else None

    def _attach(self, zero: bool = True) -> None:
        """Make the buffers the parameters' gradients; with `zero`, zeros."""
        if zero:
            torch._foreach_zero_(list(self.buffers.values()))
        for parameter, buffer in self.buffers.items():
            parameter.grad = buffer

    def _detach(self) -> None:
        for parameter in self.buffers:
            parameter.grad = None

    def _record(
        self, kind: Hashable, inputs: Inputs, labels: Tensor, scale: float, seed: int
    ) -> Tensor:
        """Record a pass, compare it with the plain one, and return its loss."""
        start = time.perf_counter()
        try:
            recorded = self._capture(inputs, labels, scale)
            self._attach()
            torch.manual_seed(seed)
            loss = recorded.replay(inputs, labels, scale)
            torch.manual_seed(seed)
            error = self._difference(loss, inputs, labels, scale)
            if not error <= self.tolerance:
                raise RuntimeError(f"a recorded pass differs from the plain one by {error:.2g}")
        except RuntimeError as failure:
            self._turn_off(_cause(failure))
            torch.manual_seed(seed)
            return self._run(inputs, labels, scale)
        self.recorded[kind] = recorded
        self.num_recorded += 1
        self._attach(zero=False)
        how = "equal to the plain pass" if error == 0 else f"off the plain pass by {error:.1g}"
        tokens, seconds = " x ".join(map(str, labels.shape)), time.perf_counter() - start
        self.run.say(
            f"CUDA graph: passes of {tokens} tokens are replayed; {how} ({seconds:.1f} s)",
            event="cuda_graph",
        )
        return loss

    def _difference(self, loss: Tensor, inputs: Inputs, labels: Tensor, scale: float) -> float:
        """Return the largest relative error of the replayed loss and gradients to those of a plain
        pass, whose gradients are freed one by one.
        """
        errors: list[Tensor] = []
        self._detach()

        def compare(parameter: nn.Parameter) -> None:
            gradient: Any = parameter.grad
            parameter.grad = None
            size = torch.linalg.vector_norm(gradient, dtype=torch.float32)
            apart = torch.linalg.vector_norm(
                self.buffers[parameter] - gradient, dtype=torch.float32
            )
            errors.append(torch.where(apart == 0, 0, apart / size))

        hooks = [
            p.register_post_accumulate_grad_hook(compare)  # type: ignore[no-untyped-call]
            for p in self.buffers
        ]
        try:
            plain = self._run(inputs, labels, scale)
        finally:
            for hook in hooks:
                hook.remove()
        if len(errors) != len(self.buffers):
            return math.inf
        largest = float(torch.stack(errors).nan_to_num(math.inf).max())
        return max(relative_error(loss, plain), largest)

    def _capture(self, inputs: Inputs, labels: Tensor, scale: float) -> Recorded:
        # Other tokens: what a kernel outside of the recording computes of them shows when compared.
        own = {k: v.roll(1, -1) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        factor = torch.full((), scale, dtype=torch.float32, device=labels.device)
        own_labels = labels.clone()
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.buffers = {p: torch.zeros_like(p) for p in trained}
        self._attach()
        graph = torch.cuda.CUDAGraph()
        # Other threads prepare batches and write checkpoints meanwhile.
        recording = torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local")
        with _undone_by_failure(labels.device), recording:
            loss = self._run(own, own_labels, factor)
        return Recorded(graph, own, own_labels, factor, loss)

    def _turn_off(self, reason: str) -> None:
        refuse_without_graph(self.job, reason)
        self._detach()
        self.off, self.num_recorded = reason, 0
        self.close()
        self.run.say(f"CUDA graph: passes are not recorded: {reason}", event="cuda_graph")


@contextmanager
def _undone_by_failure(device: torch.device) -> Iterator[None]:
    """Restore what a recording that fails leaves behind: its stream, and random numbers that can be
    drawn in a graph alone (torch 2.13).
    """
    stream = torch.cuda.current_stream(device)
    generator = torch.cuda.default_generators[stream.device_index]
    numbers = generator.clone_state()
    try:
        yield
    except BaseException:  # raised again
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(numbers)
        raise


def _cause(error: BaseException) -> str:
    """Return what ended a recording: the end of a failed one raises too."""
    while error.__context__ is not None:
        error = error.__context__
    return first_line(error)
