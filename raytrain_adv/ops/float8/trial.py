"""What float8 computes on a device, compared with what it should, before a run."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from raytrain_adv.ops.float8 import experts, grouped
from raytrain_adv.ops.float8.experts import Float8Experts
from raytrain_adv.ops.float8.linear import distance

ALIKE = ("in_features", "out_features", "scheme")


def wrong_casts(
    recipe: str, modules: Sequence[nn.Module], device: torch.device, dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """Return the casts whose bits on a GPU are not those of the definition, and of which dtype."""
    wrong: dict[str, torch.dtype] = {}
    if device.type != "cuda":
        return wrong
    if recipe == "tensorwise":
        from raytrain_adv.ops.float8.cast_kernel import wrong_tiles

        for source in {dtype, torch.float32}:  # and master weights, before they are sent
            wrong |= dict.fromkeys(wrong_tiles(source, device), source)
    if recipe == "rowwise":
        from raytrain_adv.ops.float8 import row_kernel

        wrong |= dict.fromkeys(row_kernel.wrong_casts(dtype, device), dtype)
    if any(isinstance(module, Float8Experts) for module in modules):
        wrong |= dict.fromkeys(grouped.wrong_casts(dtype, device), dtype)
    return wrong


def errors(
    modules: Sequence[nn.Module], config: object, device: torch.device, dtype: torch.dtype
) -> list[tuple[str, float, float]]:
    """Return the relative errors of a product and of its gradients for each kind of module and
    size, and what it is; `config` is torchao's, for linears.
    """
    linears: dict[object, Any] = {}
    stacks: dict[tuple[int, int, bool], None] = {}
    for module in modules:
        if isinstance(module, Float8Experts):
            stacks |= dict.fromkeys(module.kinds)
        else:
            kind = (type(module), *(vars(module).get(name) for name in ALIKE))
            linears.setdefault(kind, module)
    of_linears = [
        (f"{m.in_features} x {m.out_features}", *distance(m, config, device, dtype))
        for m in linears.values()
    ]
    return of_linears + [
        (f"experts of {a} x {b}", *experts.distance(a, b, transposed, device, dtype))
        for a, b, transposed in stacks
    ]
