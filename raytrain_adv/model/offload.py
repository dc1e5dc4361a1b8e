"""What checkpointed layers keep for backward, in host memory from forward to backward.

That is their inputs, and attention's results where these are not computed again. A stream of its
own copies them out while the next layer computes, and back while the layer above is in backward: on
the GPU are those of two layers at most, and of layers that keep theirs.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from raytrain_adv.config.job import JobConfig
from raytrain_adv.errors import JobError, TrainingError
from raytrain_adv.ops.pages import locked_pages, unlock
from raytrain_adv.text import GIB


def num_offloaded(job: JobConfig, num_layers: int) -> int:
    """Return of how many of the first layers activations are moved to host memory. Raises JobError
    when there are not so many layers, or none would be moved.
    """
    wanted = job.parallel.activation_offloading
    if wanted is True and num_layers == 1:
        found, fix = "the model has one layer", "set activation_offloading: 1, or false"
        raise JobError("activation_offloading: true leaves the last layer's here", found, fix)
    if wanted > num_layers:
        raise JobError(
            "activation_offloading is more than the model's layers",
            f"activation_offloading: {wanted}, and {num_layers} layers",
            f"give at most {num_layers}, or true, for all but the last, which backward begins with",
        )
    return num_layers - 1 if wanted is True else int(wanted)


class _Held:
    """A tensor that a layer keeps until its backward pass."""

    def __init__(self, x: Tensor, of: "_Pass") -> None:
        self.x: Tensor | None = x  # on the device
        self.of = of
        self.copy: Tensor = x  # in host memory, if it is moved
        self.ready: torch.cuda.Event | None = None  # when it is back
        self.is_used = False


class _Pass:
    """What one layer keeps of one forward pass."""

    def __init__(self, below: "_Pass | None") -> None:
        self.below = below  # that of the layer whose backward pass comes next
        self.held: list[weakref.ref[_Held]] = []


class Offload:
    """Moves what the first layers keep to host memory."""

    def __init__(self, layers: Sequence[nn.Module], num_moved: int) -> None:
        self.stream: torch.cuda.Stream | None = None
        self.free: list[Tensor] = []  # host memory, kept for later steps
        self.num_pages = 0
        self.leaving: list[tuple[Tensor, torch.cuda.Event]] = []
        self.last: Callable[[], _Pass | None] = lambda: None
        for number, layer in enumerate(layers):
            self._wrap(layer, number < num_moved)

    def _wrap(self, layer: Any, moves: bool) -> None:
        name = "forward" if layer._compiled_call_impl is None else "_compiled_call_impl"
        call = getattr(layer, name)

        def held(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return call(*args, **kwargs)
            before = len(self.leaving)
            x: Tensor = args[0] if args else kwargs["hidden_states"]
            own = _Pass(self.last())
            self.last = weakref.ref(own)
            given = {t.data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            given.remove(x.data_ptr())
            shape = x.shape

            def pack(tensor: Tensor) -> Tensor | _Held:  # kept until backward, with what it names
                if tensor.data_ptr() in given or not _is_of_tokens(tensor, shape):
                    return tensor
                return self._hold(tensor.detach(), own, moves)

            with torch.autograd.graph.saved_tensors_hooks(pack, self._give_back):
                result = call(*args, **kwargs)
            self._settle(before)
            return result

        setattr(layer, name, held)

    def _settle(self, number: int) -> None:
        """Release the first that were on their way, once they have left."""
        for x, left in self.leaving[:number]:
            torch.cuda.current_stream(x.device).wait_event(left)
        del self.leaving[:number]

    def _hold(self, x: Tensor, of: _Pass, moves: bool) -> _Held:
        held = _Held(x, of)
        of.held.append(weakref.ref(held))
        if moves:
            self._move(held, x)
        return held

    def _move(self, held: _Held, x: Tensor) -> None:
        if x.is_cuda and self.stream is None:
            self.stream = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call] # torch's own
        pages = self._pages(x.nbytes)
        weakref.finalize(held, self.free.append, pages).atexit = False
        # Dense in any order of dimensions: attention's results are transposed.
        held.copy = pages[: x.nbytes].view(x.dtype).as_strided(x.shape, x.stride())
        held.x = None
        if self.stream is None:
            held.copy.copy_(x)
            return
        self.stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self.stream):
            held.copy.copy_(x, non_blocking=True)
            self.leaving.append((x, self.stream.record_event()))

    def _pages(self, nbytes: int) -> Tensor:
        """Return host memory for this many bytes, of earlier passes if there is some."""
        self.free.sort(key=lambda pages: pages.nbytes)
        for number, pages in enumerate(self.free):
            if pages.nbytes >= nbytes:
                return self.free.pop(number)
        if self.free:  # longer sequences than before
            self._release(self.free.pop())
        self.num_pages += 1
        if self.stream is None:
            return torch.empty(nbytes, dtype=torch.uint8)
        try:
            pages, status = locked_pages(nbytes)
        except RuntimeError as error:  # PyTorch's, where the node has no more memory
            raise self._refused(nbytes, str(error)) from error
        if status:
            raise self._refused(nbytes, f"CUDA error {status}; ulimit -l may be too low")
        return pages

    def _release(self, pages: Tensor) -> None:
        self.num_pages -= 1
        if self.stream is not None:
            self.stream.synchronize()
            unlock(pages)

    def _refused(self, nbytes: int, found: str) -> TrainingError:
        return TrainingError(
            "Host memory for activation_offloading cannot be page-locked",
            f"{nbytes / GIB:.1f} GiB for a layer's activation, the {self.num_pages}th: {found}",
            "give activation_offloading a smaller number of layers, or false",
        )

    def _fetch(self, held: _Held, device: torch.device) -> Tensor:
        """Return a tensor on the device; its values may still be on their way."""
        if held.x is None:
            held.x = torch.empty_like(held.copy, device=device)
            if self.stream is None:
                return held.x.copy_(held.copy)
            # Its memory is another tensor's until what was launched so far has run.
            self.stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self.stream):
                held.x.copy_(held.copy, non_blocking=True)
                held.ready = self.stream.record_event()
        return held.x

    def _give_back(self, kept: Tensor | _Held) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self._settle(len(self.leaving))
        device = torch.device("cpu") if self.stream is None else self.stream.device
        x = self._fetch(kept, device)
        if kept.ready is not None:
            torch.cuda.current_stream(device).wait_event(kept.ready)
            kept.ready = None
        if kept.copy is not x:
            kept.x = None
        kept.is_used = True
        below = kept.of.below
        for held in () if below is None else (held() for held in below.held):
            if held is not None and not held.is_used:
                self._fetch(held, device)
        return x


def _is_of_tokens(tensor: Tensor, shape: torch.Size) -> bool:
    """Whether a tensor is a layer's input of this shape, [batch, time, features], or about as
    large: neither a weight nor a few numbers of each token.
    """
    spans = zip(tensor.shape, tensor.stride(), strict=True)
    is_dense = 1 + sum((size - 1) * stride for size, stride in spans) == tensor.numel()
    is_large = tensor.is_floating_point() and 2 * tensor.numel() >= shape.numel()
    return is_large and is_dense and shape[0] == len(tensor) and shape[1] in tensor.shape[1:]
