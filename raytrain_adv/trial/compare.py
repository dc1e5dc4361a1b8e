"""Measure how far a result is from the exact one, and how far rounding alone takes it."""

import math
from collections.abc import Mapping

import torch

TOLERANCE = {torch.float32: 3e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Largest relative error that rounding to the dtype explains: two or three roundings of each value
(in float32 with room for another order of sums)."""


def relative_error(found: torch.Tensor | None, expected: torch.Tensor) -> float:
    """Return ||found - expected|| / ||expected||, both of any shape, computed in float32.

    Infinite if there is none, if shapes differ, if values are not finite, or if only `expected` is
    zero; 0 for empty tensors.
    """
    if found is None or found.shape != expected.shape:
        return math.inf
    if expected.numel() == 0:
        return 0.0
    size = float(torch.linalg.vector_norm(expected.float()))
    error = float(torch.linalg.vector_norm(found.float() - expected.float()))
    if size == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / size if math.isfinite(error / size) else math.inf


def relative_errors(
    found: Mapping[str, torch.Tensor | None], expected: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Return the relative error of each expected result, by its name."""
    return {name: relative_error(found[name], exact) for name, exact in expected.items()}


def allowed_errors(noise: Mapping[str, float], dtype: torch.dtype) -> dict[str, float]:
    """Return the largest error of each result that rounding explains. `noise` is the original's
    when its input is rounded once more: 3 to 5 % if it rounds values to 8 bits inside.
    """
    return {name: TOLERANCE[dtype] + error for name, error in noise.items()}


def differences(errors: Mapping[str, float], allowed: Mapping[str, float]) -> list[str]:
    """Return a line for each result whose relative error is larger than allowed, NaN included."""
    return [
        f"{name} off by {error:.2g}, of which rounding explains {allowed[name]:.2g}"
        for name, error in errors.items()
        if not error <= allowed[name]
    ]


def precision(dtype: torch.dtype) -> str:
    """Return a dtype's name, as bfloat16."""
    return str(dtype).removeprefix("torch.")
