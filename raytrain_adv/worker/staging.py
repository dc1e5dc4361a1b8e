"""What goes into a checkpoint: copies of plain tensors in host memory, out of training's way.

torchao's 8-bit optimizer states are written as float32: plain tensors can be read on any number of
workers and without torchao, where the subclass can be cut only along its blocks (torchao 0.18,
subclass_8bit.py). Quantising them again on load is not exact to the last code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor


def staged(state: Any) -> Any:
    """Return the nested state with every tensor copied to host memory, sharded as it was."""
    return _mapped(state, lambda tensor: _host_copy(_plain(tensor)))


def plain_like(state: Any) -> Any:
    """Return the nested state for reading a checkpoint: its own tensors, 8-bit ones as float32."""
    return _mapped(state, _plain)


def restore_quantized(state: Any, plain: Any) -> bool:
    """Copy float32 values that were read into the state's 8-bit tensors; return whether any are."""
    if isinstance(state, dict):
        return any([restore_quantized(value, plain[key]) for key, value in state.items()])
    if isinstance(state, list | tuple):
        pairs = zip(state, plain, strict=True)
        return any([restore_quantized(value, other) for value, other in pairs])
    if not isinstance(state, torch.Tensor) or not _is_quantized(state):
        return False
    with torch.no_grad():
        _local(state).copy_(_local(plain))
    return True


def _mapped(state: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(state, dict):
        return {key: _mapped(value, change) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [_mapped(value, change) for value in state]
    return change(state) if isinstance(state, torch.Tensor) else state


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_quantized(tensor: torch.Tensor) -> bool:
    # By name: importing torchao takes a second that other jobs need not spend.
    return type(_local(tensor)).__name__ == "OptimState8bit"


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    if not _is_quantized(tensor):
        return tensor.detach()
    values: torch.Tensor = _local(tensor).dequantize()
    if not isinstance(tensor, DTensor):
        return values
    return DTensor.from_local(
        values,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    ).to(values.device)


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.device.type == "cpu" else tensor.to("cpu")
