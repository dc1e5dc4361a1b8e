"""A token-wise module on some tokens at a time, forward and backward: what it makes between its
first and last matrix exists for the tokens of one tile only.

Backward keeps the module's input, computes a tile again, and takes its gradients at once. To
torch.compile all of it is one operator; the module on a tile is compiled apart. Weight gradients
are summed over tiles in float32.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

MULTIPLE = 128
"""Tokens of a tile are a multiple of it: the height of a tile of the matrix products."""
_numbers = itertools.count()
_known: "WeakValueDictionary[int, Tiles]" = WeakValueDictionary()
"""An operator takes tensors alone: it finds its module by a number."""


class Tiles:
    """Calls a module's forward pass on tiles of its input."""

    def __init__(self, module: nn.Module, forward: Callable[[Tensor], Tensor], tokens: int) -> None:
        self.forward = forward  # bound
        self.compute = forward  # the same on a tile, compiled if layers are
        self.tokens = tokens
        """Of a tile, at most; up to MULTIPLE - 1 more for equal ones."""
        places = [
            (owner, name, p)
            for owner in module.modules()
            for name, p in owner.named_parameters(recurse=False)
            if p.is_floating_point()
        ]
        # Others may be in these places when the module runs: whole ones, copies in a lower dtype.
        self.trained = [(owner, name) for owner, name, p in places if p.requires_grad]
        self.frozen = [(owner, name) for owner, name, p in places if not p.requires_grad]
        self._register()

    def _register(self) -> None:
        number = next(_numbers)
        # A tensor, for which torch.compile does not compile each layer for itself.
        self.number = torch.tensor(number, device="cpu")
        _known[number] = self

    def __call__(self, x: Tensor) -> Tensor:
        """Return the module's result for x, [..., features]."""
        if x.shape[:-1].numel() <= self.tokens:
            return self.forward(x)
        trained = [getattr(owner, name) for owner, name in self.trained]
        frozen = [getattr(owner, name) for owner, name in self.frozen]
        result: Tensor = tiled(x.flatten(0, -2), trained, frozen, self.number)
        return result.view(x.shape)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tiles":
        """Return tiles of a copy of the module."""
        own = memo[id(self)] = copy.copy(self)
        names = ("forward", "trained", "frozen")
        vars(own).update(copy.deepcopy({name: vars(self)[name] for name in names}, memo))
        own.compute = own.forward
        own._register()
        return own

    def parts(self, num_tokens: int) -> Iterator[slice]:
        """Yield the tiles' tokens."""
        per_tile = -(-num_tokens // -(-num_tokens // self.tokens))
        size = -(-per_tile // MULTIPLE) * MULTIPLE if self.tokens >= MULTIPLE else self.tokens
        return (slice(n, min(n + size, num_tokens)) for n in range(0, num_tokens, size))

    @contextmanager
    def holding(self, trained: list[Tensor], frozen: list[Tensor]) -> Iterator[None]:
        """Make the module compute with these weights."""
        places = [*self.trained, *self.frozen]
        before = [owner._parameters[name] for owner, name in places]
        try:
            for (owner, name), weight in zip(places, [*trained, *frozen], strict=True):
                owner._parameters[name] = weight  # type: ignore[assignment] # as with FSDP2
            yield
        finally:
            for (owner, name), parameter in zip(places, before, strict=True):
                owner._parameters[name] = parameter


@contextmanager
def _autograd() -> Iterator[None]:
    """Record gradients inside of an operator, where PyTorch leaves autograd out, and with it what
    takes apart operators such as reshape, which torchao's tensors need.
    """
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    for name in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "AutogradNestedTensor"):
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set() - keys
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


@torch.library.custom_op("raytrain_adv::tiled", mutates_args=())
def tiled(x: Tensor, trained: list[Tensor], frozen: list[Tensor], number: Tensor) -> Tensor:
    """Return a module's result for x, [tokens, features], tile by tile."""
    tiles = _known[int(number)]
    result = torch.empty_like(x)
    with _autograd(), torch.no_grad(), tiles.holding(trained, frozen):
        for part in tiles.parts(len(x)):
            result[part] = tiles.compute(x[None, part])[0]
    return result


@torch.library.custom_op("raytrain_adv::tiled_backward", mutates_args=())
def tiled_backward(
    gradient: Tensor, x: Tensor, trained: list[Tensor], frozen: list[Tensor], number: Tensor
) -> list[Tensor]:
    """Return the gradients of x and of the trained weights."""
    tiles = _known[int(number)]
    weights = [weight.detach().requires_grad_() for weight in trained]
    of_input = torch.empty_like(x)
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in trained]
    with _autograd(), tiles.holding(weights, frozen):
        for part in tiles.parts(len(x)):
            tile = x[None, part].detach().requires_grad_()
            result = tiles.compute(tile)
            found = torch.autograd.grad(result, [tile, *weights], gradient[None, part])
            of_input[part] = found[0][0]
            for total, one in zip(sums, found[1:], strict=True):
                total.add_(one)
            del result, found
    return [of_input, *(s.to(w.dtype) for s, w in zip(sums, trained, strict=True))]


@tiled.register_fake
def _(x: Tensor, trained: list[Tensor], frozen: list[Tensor], number: Tensor) -> Tensor:
    return torch.empty_like(x)


@tiled_backward.register_fake
def _(
    gradient: Tensor, x: Tensor, trained: list[Tensor], frozen: list[Tensor], number: Tensor
) -> list[Tensor]:
    return [torch.empty_like(x), *map(torch.empty_like, trained)]


def _keep(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, trained, frozen, number = inputs
    ctx.num_trained = len(trained)
    ctx.save_for_backward(x, number, *trained, *frozen)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    x, number, *weights = ctx.saved_tensors
    trained, frozen = weights[: ctx.num_trained], weights[ctx.num_trained :]
    of_input, *of_weights = tiled_backward(gradient.contiguous(), x, trained, frozen, number)
    return of_input, of_weights, [None] * len(frozen), None


tiled.register_autograd(_differentiate, setup_context=_keep)
