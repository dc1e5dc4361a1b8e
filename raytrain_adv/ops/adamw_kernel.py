"""The Triton kernel of AdamW: parameters, gradients and both moments in one pass and one launch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
ALIGNED = 16  # bytes of addresses, and elements: the kernel then reads and writes 16 bytes at once
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
Tensors = tuple[Tensor, Tensor, Tensor, Tensor]
"""A parameter, its gradient and both moments, contiguous and of one shape."""


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def _pointer(address, KIND: tl.constexpr, ALIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.multiple_of(tl.load(address).to(tl.pointer_type(KIND)), ALIGN)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def _adamw(  # type: ignore[no-untyped-def] # its arguments are not Python values
    table,
    owners,
    factor,
    learning_rate,
    decay,
    beta1,
    beta2,
    correction1,
    correction2_sqrt,
    epsilon,
    PARAMETER: tl.constexpr,
    GRADIENT: tl.constexpr,
    MOMENT: tl.constexpr,
    ALIGN: tl.constexpr,
    CLIPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = table + tl.load(owners + tl.program_id(0)).to(tl.int64) * 6
    parameter = _pointer(row, PARAMETER, ALIGN)
    gradient = _pointer(row + 1, GRADIENT, ALIGN)
    exp_avg = _pointer(row + 2, MOMENT, ALIGN)
    exp_avg_sq = _pointer(row + 3, MOMENT, ALIGN)
    block = tl.program_id(0).to(tl.int64) - tl.load(row + 5)
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < tl.multiple_of(tl.load(row + 4), ALIGN)
    g = tl.load(gradient + index, mask=inside).to(tl.float32)
    if CLIPS:
        g *= tl.load(factor)
    p = tl.load(parameter + index, mask=inside).to(tl.float32)
    m = tl.load(exp_avg + index, mask=inside).to(tl.float32)
    v = tl.load(exp_avg_sq + index, mask=inside).to(tl.float32)
    p -= learning_rate * decay * p
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    p -= (learning_rate / correction1) * m / (tl.sqrt(v) / correction2_sqrt + epsilon)
    tl.store(parameter + index, p.to(PARAMETER), mask=inside)
    tl.store(exp_avg + index, m.to(MOMENT), mask=inside)
    tl.store(exp_avg_sq + index, v.to(MOMENT), mask=inside)


@dataclass(eq=False)
class _Launch:
    """What one launch takes: tensors of the same dtypes on one device."""

    table: Tensor
    """Of each tensor the addresses, numel and the number of its first block: int64 [tensors, 6]."""
    owners: Tensor
    """Of each block the number of its tensor, int32."""
    dtypes: tuple[torch.dtype, ...]
    aligned: bool

    @classmethod
    def of(cls, tensors: Sequence[Tensors], aligned: bool) -> "_Launch":
        """Prepare it; the tables are copied without waiting for the GPU."""
        device, dtypes = tensors[0][0].device, tuple(t.dtype for t in tensors[0][:3])
        sizes = np.array([found[0].numel() for found in tensors])
        blocks = -(-sizes // BLOCK)
        table = np.empty((len(sizes), 6), dtype=np.int64)
        table[:, :4] = [[t.data_ptr() for t in found] for found in tensors]
        table[:, 4], table[:, 5] = sizes, np.cumsum(blocks) - blocks
        owners = np.repeat(np.arange(len(sizes), dtype=np.int32), blocks)

        def there(array: np.ndarray[Any, Any]) -> Tensor:
            return torch.from_numpy(array).pin_memory().to(device, non_blocking=True)

        return cls(there(table), there(owners), dtypes, aligned)

    def __call__(self, factor: Tensor | None, step: int, group: Mapping[str, Any]) -> None:
        """Do step number `step` (from 1) with the numbers of a parameter group."""
        (beta1, beta2), dtypes = group["betas"], [DTYPES[dtype] for dtype in self.dtypes]
        _adamw[(self.owners.numel(),)](
            self.table,
            self.owners,
            self.table if factor is None else factor,
            float(group["lr"]),
            group["weight_decay"],
            beta1,
            beta2,
            1.0 - beta1**step,
            (1.0 - beta2**step) ** 0.5,
            group["eps"],
            PARAMETER=dtypes[0],
            GRADIENT=dtypes[1],
            MOMENT=dtypes[2],
            ALIGN=ALIGNED if self.aligned else 1,
            CLIPS=factor is not None,
            BLOCK=BLOCK,
            num_warps=8,
        )


class Launcher:
    """Does AdamW's step on many tensors; keeps its tables as long as nothing has moved."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, ...], tuple[list[int], list[_Launch]]] = {}

    def step(
        self,
        number: int,
        tensors: Sequence[Tensors],
        factor: Tensor | None,
        step: int,
        group: Mapping[str, Any],
    ) -> None:
        """Do step number `step` (from 1) in place, on the tensors of parameter group `number`;
        gradients are multiplied with `factor` unless it is none.

        Source: https://arxiv.org/abs/1711.05101; torch's fused kernel for the order of operations.
        """
        addresses = [t.data_ptr() for found in tensors for t in found]
        known, launches = self.known.get((number, len(tensors)), (None, []))
        if known != addresses:
            launches = self._launches(tensors)
            self.known[number, len(tensors)] = addresses, launches
        for launch in launches:
            launch(factor, step, group)

    def _launches(self, tensors: Sequence[Tensors]) -> list[_Launch]:
        alike: dict[tuple[Any, ...], list[Tensors]] = {}
        for found in tensors:
            if found[0].numel():
                aligned = not any(n % ALIGNED for t in found for n in (t.data_ptr(), t.numel()))
                kind = (found[0].device, *(t.dtype for t in found), aligned)
                alike.setdefault(kind, []).append(found)
        return [_Launch.of(members, kind[-1]) for kind, members in alike.items()]
