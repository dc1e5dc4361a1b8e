"""What decoder layers keep for their backward passes, counted in a forward pass on the meta device:
each operator of each kind of layer, with its shapes, and no values.

- eager: the tensors that autograd saves.
- compiled: Inductor's partitioner keeps results and inputs of matrix products and attention, and
  recomputes element-wise results from them, unless what they are made of is larger.
- selective checkpointing: results of matrix products and of attention.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from raytrain_adv.model.build import decoder_layers, keeps_float32
from raytrain_adv.model.parallel import KEPT_OPERATORS
from raytrain_adv.ops.experts.find import num_experts

COSTLY = ("mm", "conv", "index", "gather", "scatter", "sort", "topk")
"""Parts of the names of operators whose results a compiled layer does not compute again."""
SLACK = 1.1
"""How much larger than a result what it is made of may be and is still kept instead: parts of it
often are kept anyway."""
ATTENTION = ("query", "key", "value", "attn_mask")
LENGTHS = (256, 512, 768)
"""Tokens of the passes. What a layer keeps has a part for each token, a square of their number
(eager attention's weights) and one for any number of them (adapters of experts, cast)."""


@dataclass(frozen=True)
class Kept:
    """Bytes per token that a layer keeps."""

    eager: float
    compiled: float
    products: float  # results of matrix products and attention
    needed_products: float  # those of them that a compiled layer's backward pass needs
    attention: float  # results of fused attention
    sums: float  # log-sum-exp of fused attention
    largest: float  # the largest tensor of the layer's output width: routed experts' results

    def __add__(self, other: "Kept") -> "Kept":
        """Add another's bytes."""
        return Kept(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, factor: float) -> "Kept":
        """Multiply the bytes."""
        return Kept(*(getattr(self, f.name) * factor for f in fields(self)))


_counted: WeakKeyDictionary[nn.Module, dict[Any, list[list[Kept]]]] = WeakKeyDictionary()
"""Model -> dtype and mask -> of each length, of each layer: a plan predicts a model many times."""


def kept_by_layers(
    model: PreTrainedModel, dtype: torch.dtype, is_masked: bool, seq_len: int
) -> list[Kept] | None:
    """Return what each decoder layer keeps of a token in a pass of seq_len tokens that computes in
    this dtype, with a mask in attention or none; None where the model's code needs values.

    The model is on the meta device, and stays as it is.
    """
    known = _counted.setdefault(model, {})
    if (dtype, is_masked) not in known:
        try:
            counting = _Pass(_in_dtype(model, dtype), is_masked)
            known[dtype, is_masked] = [counting.kept(tokens) for tokens in LENGTHS]
        except Exception:  # noqa: BLE001 # of any model's code, on tensors without values
            known[dtype, is_masked] = []
    if not (lengths := known[dtype, is_masked]):
        return None
    shares = [  # Lagrange's
        math.prod((seq_len - other) / (one - other) for other in LENGTHS if other != one)
        for one in LENGTHS
    ]
    shares = [share * one / seq_len for share, one in zip(shares, LENGTHS, strict=True)]
    first, second, third = (
        [kept * share for kept in layers] for layers, share in zip(lengths, shares, strict=True)
    )
    return [a + b + c for a, b, c in zip(first, second, third, strict=True)]


def _in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return a copy that computes in a dtype by its classes' forward passes, with PyTorch's
    attention if it is fused: hooks of features are for the run's batches, and kernels write to
    addresses, which are 0 on the meta device: a GPU can do nothing more after that.
    """
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        vars(module).pop("forward", None)
    for config in (twin.config, twin.config.get_text_config()):
        if config._attn_implementation != "eager":  # fused ones keep the same
            config._attn_implementation = "sdpa"
    keeps = keeps_float32(twin)
    for fqn, parameter in twin.named_parameters():
        if parameter.is_floating_point() and parameter.itemsize > 1 and not keeps(fqn):
            parameter.data = parameter.data.to(dtype)
    return twin


class _Pass:
    """Passes of a model in which the first layer of each kind is counted."""

    def __init__(self, model: PreTrainedModel, is_masked: bool) -> None:
        self.model, self.is_masked = model, is_masked
        self.layers = [layer for _, layer in decoder_layers(model)]
        self.forwards = [layer.forward for layer in self.layers]
        self.kinds = [_kind(layer) for layer in self.layers]
        self.shared = {_key(t) for t in [*model.parameters(), *model.buffers()]}
        self.trace: _Trace | None = None
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(self._mark)

    def kept(self, tokens: int) -> list[Kept]:
        """Return what each layer keeps of a token."""
        found: dict[Any, tuple[Kept, Any]] = {}
        calls = Counter[int]()
        for number, layer in enumerate(self.layers):
            layer.forward = self._counting(number, found, calls)
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            _without_address(tensor)
        ids = _without_address(torch.zeros((1, tokens), dtype=torch.long, device="meta"))
        given: dict[str, Any] = {"input_ids": ids}
        if self.is_masked:
            mask = ids.new_ones((1, 1, tokens, tokens), dtype=torch.bool)
            given["attention_mask"] = _without_address(mask)
        with _WithoutValues(num_experts(self.model.config.get_text_config())), torch.enable_grad():
            self.model(**given, use_cache=False)
        return [found[kind][0] * (calls[n] / tokens) for n, kind in enumerate(self.kinds)]

    def _counting(self, number: int, found: Any, calls: Counter[int]) -> Callable[..., Any]:
        forward, kind = self.forwards[number], self.kinds[number]

        def count(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():  # of several calls of a layer, some keep nothing
                return forward(*args, **kwargs)
            calls[number] += 1
            if kind not in found:
                x: Tensor = args[0] if args else kwargs["hidden_states"]
                own = x.detach().requires_grad_()  # as after a layer with trained weights
                args, kwargs = (own, *args[1:]), {**kwargs}
                kwargs.pop("hidden_states", None)
                given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
                self.trace = _Trace(self.shared | {*map(_key, given)} - {_key(own)}, own)
                hooks = torch.autograd.graph.saved_tensors_hooks(self.trace.save, lambda t: t)
                with self.trace, _FusedAttention(self.trace), hooks:
                    result = forward(*args, **kwargs)
                found[kind] = self.trace.kept(), result
                self.trace = None
            return found[kind][1]

        return count

    def _mark(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Note what a linear is given: some multiply something made of it."""
        if self.trace is not None:
            self.trace.costly.update(_key(t) for t in args if isinstance(t, Tensor))


def _without_address(tensor: Tensor) -> Tensor:
    """Have a tensor raise where code asks for its address, as Triton's launchers do."""
    torch._C._set_throw_on_mutable_data_ptr(tensor)
    return tensor


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _kind(layer: nn.Module) -> Any:
    """Return what layers that keep the same have in common."""
    tensors = tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in layer.named_parameters())
    plain = tuple(
        (fqn, name, value)
        for fqn, module in layer.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str) and not name.endswith(("idx", "id"))
    )
    return type(layer), tensors, plain


class _Trace(TorchDispatchMode):
    """The storages of a layer's forward pass: how each was made, and which autograd saves."""

    def __init__(self, shared: set[int], x: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's own
        self.shared = shared  # weights, and what other layers are given too
        self.alive: list[Tensor] = []  # so that no key is used again
        self.sizes: dict[int, int] = {}  # in the order in which they were made
        self.sources: dict[int, list[int]] = {}
        self.costly = {_key(x)}  # inputs and results of products and attention
        self.products: set[int] = set()
        self.attention: set[int] = set()
        self.sums: set[int] = set()
        self.weights: set[int] = set()  # softmax results
        self.saved: set[int] = set()
        self.of_tokens = {_key(x)}  # made of the input: no unpacked weights
        self.largest = 0
        self.made: dict[Any, int] = {}
        self.first: dict[int, int] = {}  # result -> the first one of the same operator and inputs
        self.hold(x)

    def save(self, tensor: Tensor) -> Tensor:
        """Note a tensor that autograd saves."""
        if (key := _key(tensor)) not in self.shared:
            self.hold(tensor)
            self.saved.add(key)
        return tensor

    def attend(self, inputs: list[Tensor], result: Tensor, sums: Tensor) -> None:
        """Note fused attention."""
        self.costly.update(map(_key, (*inputs, result, sums)))
        self.products |= {_key(result), _key(sums)}
        self.attention.add(_key(result))
        self.sums.add(_key(sums))
        for made in (result, sums):
            self.hold(made)
            self.of_tokens.add(_key(made))
            self.sources[_key(made)] = [_key(t) for t in inputs]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and note what its results are made of."""
        results = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs))
        inputs = [t for t in leaves if isinstance(t, Tensor)]
        keys = [key for t in inputs if (key := self._same(t)) not in self.shared]
        places = tuple((self._same(t), t.storage_offset(), t.shape, t.stride()) for t in inputs)
        plain = tuple(str(leaf) for leaf in leaves if not isinstance(leaf, Tensor))
        is_of_tokens = not self.of_tokens.isdisjoint(map(_key, inputs))
        is_costly = any(part in func.overloadpacket.__name__ for part in COSTLY)
        if is_costly:
            self.costly.update(keys)
        for number, result in enumerate(tree_leaves(results)):
            if not isinstance(result, Tensor):
                continue
            if is_of_tokens:
                self._of_tokens(result)
            if (key := _key(result)) in self.shared or key in self.sizes:
                continue
            self.hold(result)
            self.sources[key] = keys
            if func in KEPT_OPERATORS:
                self.products.add(key)
            if func is torch.ops.aten._softmax.default:
                self.weights.add(key)
            if is_costly:
                self.costly.add(key)
            else:  # a compiled layer computes the same once
                self.first[key] = self.made.setdefault((func, places, plain, number), key)
        return results

    def hold(self, tensor: Tensor) -> None:
        """Note a storage."""
        self.alive.append(tensor)
        self.sizes.setdefault(_key(tensor), tensor.untyped_storage().nbytes())

    def _of_tokens(self, tensor: Tensor) -> None:
        self.of_tokens.add(_key(tensor))
        if tensor.shape[-1:] == self.alive[0].shape[-1:]:
            self.largest = max(self.largest, tensor.nbytes)

    def _same(self, tensor: Tensor) -> int:
        key = _key(tensor)
        return self.first.get(key, key)

    def kept(self) -> Kept:
        """Return the bytes that the layer keeps."""

        def size(keys: set[int]) -> int:
            return sum(self.sizes[key] for key in keys)

        needed = self._made_of({key: self.sources.get(key, []) for key in self.sizes})
        return Kept(
            eager=size(self.saved),
            compiled=size(self._compiled()),
            products=size(self.products),
            needed_products=size(needed & self.products),
            attention=size(self.attention),
            sums=size(self.sums),
            largest=self.largest,
        )

    def _compiled(self) -> set[int]:
        """Return what a compiled layer keeps."""
        forced = {self.first.get(key, key) for key in self.saved} & self.costly
        # Softmax is computed again for its own backward pass, from its input.
        forced |= {k for key in forced & self.weights for k in self.sources[key] if k in self.sizes}
        cost: dict[int, float] = {}
        parts: dict[int, list[int]] = {}
        for key, size in self.sizes.items():
            again = float("inf")
            if key in self.sources and key not in self.costly:
                again = sum(cost[k] for k in {*self.sources[key]} if k in cost)
                if again <= SLACK * size:
                    parts[key] = self.sources[key]
            cost[key] = 0 if key in forced else min(size, again)
        return forced | {key for key in self._made_of(parts, forced) if key not in parts}

    def _made_of(self, parts: dict[int, list[int]], stop: set[int] | None = None) -> set[int]:
        """Return what is saved, and what its storages are made of."""
        ends = self.products if stop is None else stop
        todo, found = [self.first.get(key, key) for key in self.saved], set[int]()
        while todo:
            if (key := todo.pop()) not in found:
                found.add(key)
                todo += [] if key in ends else parts.get(key, [])
        return found


class _FusedAttention(TorchFunctionMode):
    """PyTorch's attention as one operator: the meta device would compute it by its parts."""

    def __init__(self, trace: _Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace one function."""
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = dict(zip(ATTENTION, args, strict=False)) | (kwargs or {})
        inputs = [given[name] for name in ATTENTION if given.get(name) is not None]
        return _Attention.apply(self.trace, *inputs)  # type: ignore[no-untyped-call] # torch's own


class _Attention(torch.autograd.Function):
    """Keeps what fused kernels keep, and of a mask a copy in the dtype of the scores."""

    @staticmethod
    def forward(
        ctx: Any, trace: _Trace, query: Tensor, key: Tensor, value: Tensor, *masks: Tensor
    ) -> Tensor:
        shape = [*query.shape[:-1], value.shape[-1]]
        if query.stride(-2) > query.stride(-3):  # the result's layout is that of the query
            shape[-3:-1] = shape[-2], shape[-3]
            result = query.new_empty(shape).transpose(-2, -3)
        else:
            result = query.new_empty(shape)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        trace.attend([query, key, value], result, sums)
        biases = [query.new_empty(mask.shape) for mask in masks]
        ctx.save_for_backward(query, key, value, result, sums, *biases)
        return result


class _WithoutValues(TorchDispatchMode):
    """Answers what code asks of values: yes, one, and as many tokens for each expert."""

    def __init__(self, experts: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's own
        self.experts = max(experts, 1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, or answer."""
        results = self._results(func, args, kwargs or {})
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and result.is_meta:
                _without_address(result)
        return results

    def _results(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        if func is torch.ops.aten.nonzero.default:
            mask: Tensor = args[0]
            found = mask.numel() // (1 if mask.ndim == 1 else self.experts)
            return mask.new_empty((found, mask.ndim), dtype=torch.long)
        if func is torch.ops.aten._grouped_mm.default and args[1].ndim == 3:  # bfloat16 alone
            return args[0].new_empty((*args[0].shape[:-1], args[1].shape[-1]))
        return func(*args, **kwargs)
