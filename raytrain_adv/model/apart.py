"""Keep packed conversations apart in modules that cannot be told where these begin: recurrent
layers without kernels that take bounds, attention that makes its own mask. Each is called once for
each conversation.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.nn.functional import pad
from torch.utils._pytree import tree_leaves, tree_map

MULTIPLE = 16
Span = tuple[int, int]
"""First token of a conversation, and the one after its last."""


class Apart:
    """The modules of a model that are called once for each conversation of a packed row."""

    def __init__(self, model: nn.Module, takes_positions: bool) -> None:
        self.takes_positions = takes_positions
        self.spans: list[Span] = []
        """Of the row that the model computes; empty if it is not packed."""
        self.modules: list[nn.Module] = []
        self.handle = model.register_forward_pre_hook(self._begin, with_kwargs=True)

    def add(self, module: nn.Module) -> None:
        """Call a module once for each conversation from now on."""
        module.forward = partial(self._forward, module.forward)
        self.modules.append(module)

    def remove(self) -> None:
        """Call all modules as before."""
        self.handle.remove()
        for module in self.modules:
            del module.forward  # its class's shows again

    def _begin(self, model: nn.Module, args: Any, given: dict[str, Any]) -> Any:
        positions = given.get("position_ids")
        self.spans = []
        if positions is None or len(positions) > 1 or given.get("attention_mask") is not None:
            return None
        starts = torch.nonzero(positions.flatten() == 0).flatten().tolist()
        self.spans = list(pairwise([*starts, positions.numel()]))
        kept = given if self.takes_positions else {**given}
        if not self.takes_positions:
            del kept["position_ids"]
        return args, kept

    @torch._dynamo.disable  # type: ignore[untyped-decorator] # lengths differ from row to row
    def _forward(self, plain: Any, *args: Any, **given: Any) -> Any:
        if len(self.spans) < 2:
            return plain(*args, **given)
        return in_parts(plain, args, given, self.spans)


def in_parts(plain: Any, args: Any, given: Any, spans: Sequence[Span]) -> Any:
    """Call a module's forward pass once for each conversation, and join what it returns. Each is
    padded on the right to a multiple of 16 tokens, which products in 8 bits need; modules that take
    masks get theirs, without padding.
    """
    length = spans[-1][1]
    multiple = 1 if any(_is_mask(x, length) for x in tree_leaves((args, given))) else MULTIPLE
    parts = []
    for start, end in spans:
        cut = partial(_cut, start=start, end=end, length=length, multiple=multiple)
        own, named = tree_map(cut, (args, given))
        shorten = partial(_shortened, length=end - start, multiple=multiple)
        parts.append(tree_map(shorten, plain(*own, **named)))
    lengths = [end - start for start, end in spans]
    return tree_map(lambda *outputs: _joined(outputs, lengths), *parts)


def _is_mask(value: Any, length: int) -> bool:
    """Whether a value is a tensor [..., length, length] of booleans, or of several heads."""
    return (
        isinstance(value, Tensor)
        and value.shape[-2:] == (length, length)
        and (value.ndim == 4 or value.dtype is torch.bool)
    )


def _cut(value: Any, start: int, end: int, length: int, multiple: int) -> Any:
    """Return a conversation's part of an argument: of tensors along their first axis of `length`
    tokens after the batch's, and of masks along both.
    """
    if _is_mask(value, length):
        return value[..., start:end, start:end]
    if not isinstance(value, Tensor) or length not in value.shape[1:]:
        return value
    axis = value.shape[1:].index(length) + 1
    own = value.narrow(axis, start, end - start)
    return pad(own, (*[0, 0] * (value.ndim - axis - 1), 0, (start - end) % multiple))


def _shortened(output: Any, length: int, multiple: int) -> Any:
    """Return an output [batch, padded tokens, ...] without padding, another as it is."""
    padded = length + -length % multiple
    if isinstance(output, Tensor) and output.ndim > 1 and output.shape[1] == padded:
        return output[:, :length]
    return output


def _joined(parts: tuple[Any, ...], lengths: list[int]) -> Any:
    """Return outputs [batch, tokens, ...] as one; of others the last."""
    if all(isinstance(p, Tensor) and p.ndim > 1 for p in parts) and lengths == [
        p.shape[1] for p in parts
    ]:
        return torch.cat(parts, 1)
    return parts[-1]


class Mixing:
    """Finds the modules whose output for a conversation depends on the one before it, or is another
    if it is alone, in a forward pass of a row of two.
    """

    def __init__(self, model: nn.Module, spans: Sequence[Span], seen: float, off: float) -> None:
        self.spans, self.seen, self.off = spans, seen, off
        self.found = set[nn.Module]()
        self.units = dict(_units(model))
        self.busy = False

    def __enter__(self) -> Self:
        hooked = {m for unit, children in self.units.items() for m in (unit, *children)}
        self.handles = [m.register_forward_hook(self._try, with_kwargs=True) for m in hooked]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def chosen(self) -> Iterator[nn.Module]:
        """Yield children of layers that mix, and layers of which no child does."""
        for unit, children in self.units.items():
            mixing = [child for child in children if child in self.found]
            yield from mixing or ([unit] if unit in self.found else [])

    def _try(self, module: nn.Module, args: Any, given: Mapping[str, Any], output: Any) -> None:
        if self.busy:
            return
        self.busy = True
        try:
            if self._mixes(module, args, given, output):
                self.found.add(module)
        finally:
            self.busy = False

    def _mixes(self, module: nn.Module, args: Any, given: Any, output: Any) -> bool:
        start, length = self.spans[-1]
        where, states = next(
            ((k, x) for k, x in (*enumerate(args), *given.items()) if _is_states(x, length)),
            (None, None),
        )
        if states is None:
            return False
        other = torch.cat([states[:, :start].flip(1) * -0.7, states[:, start:]], 1)
        changed = [other if i == where else x for i, x in enumerate(args)]
        named = {name: other if name == where else x for name, x in given.items()}
        with torch.no_grad():
            theirs = module.forward(*changed, **named)
            alone = in_parts(module.forward, args, given, self.spans)
        return _differs(theirs, output, start, self.seen) or _differs(
            alone, output, start, self.off
        )


def _is_states(value: Any, length: int) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.ndim > 2
        and value.shape[1] == length
    )


def _differs(found: Any, output: Any, start: int, most: float) -> bool:
    """Whether outputs differ behind a token by more than a share."""
    ours, theirs = (x[0] if isinstance(x, tuple | list) else x for x in (found, output))
    if not isinstance(ours, Tensor) or ours.ndim < 2:
        return False
    ours, theirs = ours[:, start:].float(), theirs[:, start:].float()
    return float((ours - theirs).norm()) > most * float(theirs.norm())


def _units(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Yield the modules of outermost lists, without checkpoint wrappers, and their children."""
    lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    for name in lists:
        if any(name.startswith(f"{outer}.") for outer in lists):
            continue
        for layer in model.get_submodule(name).children():
            inner = (
                layer._checkpoint_wrapped_module if isinstance(layer, CheckpointWrapper) else layer
            )
            yield inner, list(inner.children())
