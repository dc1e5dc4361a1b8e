"""Weights that FSDP2 gathers in float8: creating them, and converting them to plain tensors."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from raytrain_adv.dtensor import SHARDED
from raytrain_adv.ops.float8.cast import cast_padded, scale_of

aten = torch.ops.aten
KEEP_THE_TYPE = frozenset(
    (
        aten.detach.default,
        aten.empty_like.default,
        aten.new_zeros.default,
        aten.slice.Tensor,
        aten.copy_.default,
        aten.view.default,
        aten.as_strided.default,
        aten._to_copy.default,
        aten._pin_memory.default,
        aten.split.Tensor,
        aten.clone.default,
    )
)
"""What FSDP2 does to a weight to shard it, move it, or give it memory."""


@dataclass(eq=False)
class Scale:
    """The scale of a weight's cast; shared by all forms FSDP2 makes of it.

    It equals itself alone and is its own copy: a number would be a guard of compiled code that
    takes the weight, and each new value would compile it again.
    """

    value: Tensor | None = None
    """float32 scalar on the device that gathers; none until update_scales has been called."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Scale":
        return self


class GatheredInFloat8(Tensor):
    """A weight, or a rank's shard of one, that FSDP2 casts to e4m3 before it gathers it.

    The numbers are those of torchao's WeightWithDynamicFloat8CastTensor, which moves 27 bytes a
    number per pass instead of 3, needs a number of rows that the ranks divide, and forgets the
    scale when FSDP2 pads a shard or moves it from host memory to the GPU.
    """

    @staticmethod
    def __new__(cls, tensor: Tensor, scale: "Scale") -> "GatheredInFloat8":
        """Make a tensor that looks like `tensor` and owns nothing."""
        made: GatheredInFloat8 = Tensor._make_wrapper_subclass(
            cls,
            tensor.size(),
            strides=tensor.stride(),
            storage_offset=tensor.storage_offset(),
            dtype=tensor.dtype,
            layout=tensor.layout,
            device=tensor.device,
            pin_memory=tensor.is_pinned(),
            requires_grad=tensor.requires_grad,
        )
        return made

    def __init__(self, tensor: Tensor, scale: Scale) -> None:
        self.plain = tensor
        self.scale = scale

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.plain}, {self.scale})"

    def __tensor_flatten__(self) -> tuple[list[str], Scale]:
        return ["plain"], self.scale

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], scale: Scale, outer_size: Any, outer_stride: Any
    ) -> "GatheredInFloat8":
        return GatheredInFloat8(inner["plain"], scale)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch declares no class method
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        plain = pytree.tree_map_only(GatheredInFloat8, lambda t: t.plain, (args, kwargs or {}))
        out = func(*plain[0], **plain[1])
        first = args[0]
        if func not in KEEP_THE_TYPE or not isinstance(first, GatheredInFloat8):
            return out
        return pytree.tree_map_only(Tensor, lambda t: GatheredInFloat8(t, first.scale), out)

    def fsdp_pre_all_gather(
        self,
        mesh: DeviceMesh,
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
        module: nn.Module,
        mp_policy: MixedPrecisionPolicy,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the bytes of this rank's rows in e4m3, and the scale; called by FSDP2."""
        scale = self.scale.value
        if scale is None:
            largest = _largest([self.plain])
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=mesh.get_group())
            scale = scale_of(largest[0], torch.float8_e4m3fn)
        # All ranks send the same number of rows: the last ones may own fewer.
        num_rows = -(-outer_size[0] // mesh.size())
        rows = cast_padded(self.plain, scale, torch.float8_e4m3fn, num_rows)
        return (rows.view(torch.uint8),), (scale,)  # as bytes: gloo gathers no float8

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[Tensor, ...],
        metadata: tuple[Tensor, ...],
        param_dtype: torch.dtype,
        *,
        out: Any = None,  # what an earlier call has made
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Make the whole weight of what was gathered, or rescale the old one; FSDP2 calls it."""
        # Here, because what reads and writes checkpoints of any job comes by this module.
        from torchao.float8.float8_training_tensor import Float8TrainingTensor

        (data,), (scale,) = all_gather_outputs, metadata
        if out is None:
            values = data.view(torch.float8_e4m3fn)
            return Float8TrainingTensor(values, scale, param_dtype, None), (data,)
        out._scale = scale
        return None


def gather_in_float8(linear: nn.Linear) -> None:
    """Make FSDP2 cast this linear's weight before it is gathered; call it before fully_shard.

    Source: torchao.float8.float8_linear.Float8Linear.from_float, which does it at conversion.
    """
    linear.weight = nn.Parameter(
        GatheredInFloat8(linear.weight, Scale()), requires_grad=linear.weight.requires_grad
    )


@torch.no_grad()
def update_scales(model: nn.Module) -> None:
    """Compute the scales of all trained weights gathered in float8, with one all-reduce.

    To be called after their values changed. Source: precompute_float8_dynamic_scale_for_fsdp of
    torchao.float8, whose DTensor collectives crash if ranks share a GPU over gloo (torch 2.11).
    """
    parameters = [p for p in model.parameters() if isinstance(p, DTensor)]
    shards = [
        local
        for p in parameters
        if isinstance(local := p._local_tensor, GatheredInFloat8)
        and (p.requires_grad or local.scale.value is None)
    ]
    if not shards:
        return
    mesh = parameters[0].device_mesh
    # With CPU offload the shards are in host memory, and the collectives run on the GPUs.
    largest = _largest([shard.plain for shard in shards]).to(mesh.device_type)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=mesh.get_group(SHARDED))
    scales = scale_of(largest, torch.float8_e4m3fn).unbind()
    for shard, scale in zip(shards, scales, strict=True):
        shard.scale.value = scale


def _largest(tensors: list[Tensor]) -> Tensor:
    """Return each tensor's largest magnitude, 0 for an empty one: [len(tensors)], float32."""
    filled = [t if t.numel() else t.new_zeros(1) for t in tensors]
    return torch.stack(torch._foreach_norm(filled, ord=math.inf)).to(torch.float32)


def as_plain(tensor: Tensor) -> Tensor:
    """Return the same storage without the type above, which only torchao can load."""
    if isinstance(tensor, GatheredInFloat8):
        return tensor.plain
    if not isinstance(tensor, DTensor):
        return tensor
    local = tensor._local_tensor
    if not isinstance(local, GatheredInFloat8):
        return tensor
    return DTensor.from_local(
        local.plain,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
