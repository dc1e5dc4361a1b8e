"""The head's product and the cross-entropy in one, chunk by chunk: all logits never exist at once.

Gradients are made in forward, where a chunk's logits are at hand: three products per chunk, none
computed again. Backward multiplies them by the gradient of the sum, a scalar: 0.5 ms for an 8B
model's head on an H200, less than asking the GPU whether the scalar is 1.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrain_adv.ops.loss import IGNORE

CHUNK_BYTES = 7 * 2**26
"""Most memory that a chunk's logits take.

Head and loss of an 8B model then take 1.44 GiB for 8,192 tokens. Larger chunks are hardly faster:
1,024 tokens 40.9 ms, 2,048 40.2 ms (H200; jobs/benchmarks/results/loss_kernels.json).
"""
CHUNK_MULTIPLE = 128
"""Tokens of a chunk are a multiple of it: the height of a tile of the matrix products."""
MOST_ROUNDINGS = 16
"""Chunks whose weight gradients are added up in the weight's own dtype; above, in float32.

In bf16 8 chunks are 2 times as far from the exact gradient as one product, 128 chunks 8 times.
"""

HeadForward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LogitMap:
    """From a head's output to logits: softcap * tanh(scale * x / softcap)."""

    scale: float = 1.0
    softcap: float | None = None  # largest magnitude of a logit; none leaves them as they are

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits of a head's output, of its dtype."""
        if self.scale != 1.0:
            x = x * self.scale
        return x if self.softcap is None else torch.tanh(x / self.softcap) * self.softcap


def chunk_tokens(num_tokens: int, vocab: int, itemsize: int) -> int:
    """Return a chunk's tokens: the fewest chunks of at most CHUNK_BYTES, about equally long."""
    fitting = CHUNK_BYTES // (vocab * itemsize)
    largest = max(fitting // CHUNK_MULTIPLE * CHUNK_MULTIPLE, CHUNK_MULTIPLE)
    num_chunks = max(-(-num_tokens // largest), 1)
    per_chunk = -(-num_tokens // num_chunks)
    return max(-(-per_chunk // CHUNK_MULTIPLE) * CHUNK_MULTIPLE, CHUNK_MULTIPLE)


def chunks(num_tokens: int, vocab: int, itemsize: int) -> Iterator[slice]:
    """Yield the chunks of a number of tokens, in order."""
    size = chunk_tokens(num_tokens, vocab, itemsize)
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, logit_map: LogitMap
) -> Tensor:
    """Return the cross-entropy summed over the labels, a float32 scalar, of a plain linear head.

    Args:
        hidden: [tokens, hidden], of the weight's dtype.
        weight: [vocabulary, hidden].
        bias: [vocabulary], or none.
        labels: [tokens], the token that follows, or IGNORE.
        logit_map: what the model does to the product.
    """
    trains = torch.is_grad_enabled()
    loss: Tensor = _OfLinear.apply(hidden, weight, bias, labels, logit_map, trains)  # type: ignore[no-untyped-call]
    return loss


def called_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    forward: HeadForward,
    parameters: list[nn.Parameter],
    vocab: int,
    logit_map: LogitMap,
) -> Tensor:
    """Return what linear_cross_entropy does, of any head: its forward, which makes [tokens, vocab]
    of [tokens, hidden] with the parameters, is called for each chunk.
    """
    compute = _Chunk(forward, logit_map)
    if not torch.is_grad_enabled():
        total = hidden.new_zeros((), dtype=torch.float32)
        for part in chunks(hidden.shape[0], vocab, hidden.element_size()):
            total += compute(hidden[part], labels[part])
        return total
    trained = [p for p in parameters if p.requires_grad]
    loss: Tensor = _OfCalled.apply(hidden, labels, compute, vocab, *trained)  # type: ignore[no-untyped-call]
    return loss


class _OfLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        logit_map: LogitMap,
        trains: bool,
    ) -> Tensor:
        wants = [needed and trains for needed in ctx.needs_input_grad[:3]]
        total = hidden.new_zeros((), dtype=torch.float32)
        parts = list(chunks(hidden.shape[0], weight.shape[0], hidden.element_size()))
        longest = max((part.stop - part.start for part in parts), default=0)
        buffer = hidden.new_empty((longest, weight.shape[0]))
        grad_hidden = torch.empty_like(hidden) if wants[0] else None
        grad_weight = WeightGradient(weight, len(parts)) if wants[1] else None
        grad_bias = weight.new_zeros(weight.shape[0], dtype=torch.float32) if wants[2] else None
        for part in parts:
            rows = buffer[: part.stop - part.start]
            if bias is None:
                torch.mm(hidden[part], weight.t(), out=rows)
            else:
                torch.addmm(bias, hidden[part], weight.t(), out=rows)
            total += softmax_gradient_(rows, labels[part], logit_map, any(wants)).sum()
            if grad_hidden is not None:
                torch.mm(rows, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.add(rows, hidden[part])
            if grad_bias is not None:
                grad_bias += rows.sum(0, dtype=torch.float32)
        ctx.gradients = (
            grad_hidden,
            grad_weight.result() if grad_weight is not None else None,
            grad_bias.to(weight.dtype) if grad_bias is not None else None,
        )
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*scaled(ctx, gradients[0]), None, None, None)


class _OfCalled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        compute: "_Chunk",
        vocab: int,
        *trained: nn.Parameter,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.zeros_like(hidden)
        parts = list(chunks(hidden.shape[0], vocab, hidden.element_size()))
        in_float32 = len(parts) > MOST_ROUNDINGS
        sums: list[Tensor | None] = [None] * len(trained)
        for part in parts:
            with torch.enable_grad():
                rows = hidden[part].detach().requires_grad_()
                loss = compute(rows, labels[part])
            total += loss.detach()
            grad_rows, *found = torch.autograd.grad(loss, [rows, *trained], allow_unused=True)
            if grad_rows is not None:
                grad_hidden[part] = grad_rows
            for i, gradient in enumerate(found):
                known = sums[i]
                if known is not None and gradient is not None:
                    known += gradient
                elif gradient is not None:
                    sums[i] = gradient.float() if in_float32 else gradient
        of_trained = [
            None if s is None else s.to(p.dtype) for s, p in zip(sums, trained, strict=True)
        ]
        ctx.gradients = (grad_hidden, *of_trained)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, *of_trained = scaled(ctx, gradients[0])
        return (of_hidden, None, None, None, *of_trained)


def scaled(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
    """Return the scaled gradients, and drop other references, so that autograd need not copy."""
    gradients: tuple[Tensor | None, ...] | None = ctx.gradients
    if gradients is None:
        raise RuntimeError("the chunked loss keeps its gradients for one backward pass only")
    ctx.gradients = None
    for gradient in gradients:
        if gradient is not None:
            scale_(gradient, factor)
    return gradients


@torch.no_grad()
def scale_(x: Tensor, factor: Tensor) -> None:
    """Multiply in place by a float32 scalar on the device; mul_ would round it to bf16 first."""
    if x.is_cuda:
        from raytrain_adv.ops.loss.linear_cross_entropy_kernel import launch_scale

        launch_scale(x, factor)
    else:
        x.copy_(x.float() * factor)


class WeightGradient:
    """The weight's gradient, added up over products; in float32 if there are many."""

    def __init__(self, weight: Tensor, num_products: int) -> None:
        self.weight = weight
        is_exact = num_products > MOST_ROUNDINGS and weight.dtype.itemsize < 4
        self.dtype = torch.float32 if is_exact else weight.dtype
        self.total: Tensor | None = None

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        """Add gradient.t() [vocabulary, tokens] @ hidden [tokens, hidden]."""
        left, total = gradient.t(), self.total
        if self.dtype == hidden.dtype and total is not None:
            total.addmm_(left, hidden)
        elif self.dtype != hidden.dtype and hidden.is_cuda:
            # A product of bf16 that is added to float32: torch 2.8 and newer, on GPUs.
            self.total = torch.empty_like(self.weight, dtype=self.dtype) if total is None else total
            torch.addmm(
                self.total,
                left,
                hidden,
                beta=int(total is not None),
                out_dtype=self.dtype,
                out=self.total,
            )
        else:
            self.add_product(torch.mm(left, hidden))

    def add_product(self, product: Tensor) -> None:
        """Add a product [vocabulary, hidden], which is not used again."""
        self.total = product.to(self.dtype) if self.total is None else self.total.add_(product)

    def result(self) -> Tensor:
        """Return the sum in the weight's dtype."""
        total = torch.zeros_like(self.weight) if self.total is None else self.total
        return total.to(self.weight.dtype)


class _Chunk:
    """The loss of one chunk, for autograd to go through."""

    def __init__(self, forward: HeadForward, logit_map: LogitMap) -> None:
        self.forward = forward
        self.logit_map = logit_map

    def __call__(self, hidden: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = _InPlace.apply(self.forward(hidden), labels, self.logit_map)  # type: ignore[no-untyped-call]
        return loss


class _InPlace(torch.autograd.Function):
    """Cross-entropy that writes its gradient over what it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, logit_map: LogitMap) -> Tensor:
        # The new version tells autograd that what was kept of x for backward is gone.
        gradient = x.detach().contiguous()
        torch.autograd.graph.increment_version(x)
        losses = softmax_gradient_(gradient, labels, logit_map, ctx.needs_input_grad[0])
        ctx.gradient = gradient
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        scale_(gradient, gradients[0])
        return gradient, None, None


def softmax_gradient_(x: Tensor, labels: Tensor, logit_map: LogitMap, write: bool) -> Tensor:
    """Return each row's cross-entropy, float32 [rows]; with `write`, write its gradient over x.

    x is [rows, vocabulary], contiguous; the loss and gradient of labels IGNORE are 0.
    """
    if x.is_cuda:
        from raytrain_adv.ops.loss.linear_cross_entropy_kernel import launch

        return launch(x, labels, logit_map.scale, logit_map.softcap, write, IGNORE)
    return reference_softmax_gradient_(x, labels, logit_map, write)


@torch.no_grad()
def reference_softmax_gradient_(
    x: Tensor, labels: Tensor, logit_map: LogitMap, write: bool
) -> Tensor:
    """Do what softmax_gradient_ does by torch's own operations, on a float32 copy."""
    logits = logit_map(x.float())
    log_probabilities = F.log_softmax(logits, dim=-1)
    valid = labels != IGNORE
    target = labels.clamp(min=0).unsqueeze(-1)
    losses = torch.where(valid, -log_probabilities.gather(-1, target).squeeze(-1), 0.0)
    if write:
        gradient = log_probabilities.exp_()
        gradient.scatter_add_(-1, target, gradient.new_full(target.shape, -1.0))
        if logit_map.softcap is not None:
            gradient *= 1.0 - (logits / logit_map.softcap).square()
        gradient *= logit_map.scale
        x.copy_(torch.where(valid.unsqueeze(-1), gradient, 0.0))
    return losses
