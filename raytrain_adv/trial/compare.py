"""How far a result is from the exact one, and how far rounding alone takes it."""

from __future__ import annotations

import math

import torch


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ||found - expected|| / ||expected||, both of any shape, computed in float32.

    Infinite where shapes differ, where values are not finite, or where only `expected` is zero; 0
    for empty tensors.
    """
    if found.shape != expected.shape:
        return math.inf
    if expected.numel() == 0:
        return 0.0
    size = float(torch.linalg.vector_norm(expected.float()))
    error = float(torch.linalg.vector_norm(found.float() - expected.float()))
    if size == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / size if math.isfinite(error / size) else math.inf


def differences(
    errors: dict[str, float], allowed: dict[str, float], because: str = "rounding explains"
) -> list[str]:
    """Return a line for each result whose relative error is larger than allowed, NaN included."""
    return [
        f"{name} off by {error:.2g}, {because} {allowed[name]:.2g}"
        for name, error in errors.items()
        if not error <= allowed[name]
    ]
