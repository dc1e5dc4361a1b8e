"""Compile each layer, recompute its activations, shard it: in this order, as FSDP2 wants it."""

import inspect
import re
from collections import Counter
from collections.abc import Callable, Collection
from functools import cache, partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.dtensor import SHARDED
from raytrain_adv.errors import JobError, TrainingError
from raytrain_adv.model.build import decoder_layers, keeps_float32
from raytrain_adv.model.master_weights import cast_in_forward
from raytrain_adv.model.offload import Offload, num_offloaded
from raytrain_adv.ops.float8 import grouped  # noqa: F401 # registers the operator
from raytrain_adv.probe_script import versions
from raytrain_adv.text import first_line, listed
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.modules import is_read

P = ParamSpec("P")
T = TypeVar("T")
ATTENTION = frozenset([
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
])  # fmt: skip
# Kept by selective checkpointing: what costs most to compute again. The rest of a layer is
# element-wise.
KEPT_OPERATORS = ATTENTION | {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.raytrain_adv.float8_grouped_mm.default,
}
FORWARDLESS = (nn.ModuleList, nn.ModuleDict)
MOST_GRAPHS = 64
"""Times that a kind of layer may be compiled."""
EVERY_THIRD = re.compile(r":[^\[\],:]*:\s*3\s*[\],]|slice\([^()]*,\s*3\)")
"""A slice with step 3 in source text: x[..., 1::3], slice(offset, length, 3)."""


def checkpointing_mode(job: JobConfig) -> str:
    """Return none, full, attention or selective. Unset means full, as in LLaMA-Factory."""
    mode = job.parallel.gradient_checkpointing
    if job.parallel.disable_gradient_checkpointing or mode is False or mode == "none":
        return "none"
    return mode if isinstance(mode, str) else "full"


def recomputes_casts(job: JobConfig) -> bool:
    """Whether one worker makes copies of a layer's weights in the compute dtype again in backward.
    What makes them is outside of what is compiled, which would run eager with it inside; where a
    policy chooses what is kept, that is the whole layer: it must see the compiled operators.
    """
    mode = checkpointing_mode(job)
    return mode == "full" or (mode != "none" and not job.parallel.torch_compile)


def compute_dtype(job: JobConfig) -> torch.dtype:
    """Return the dtype of matrix products and activations."""
    return torch.bfloat16 if job.train.computes_in_bf16 else torch.float32


def reduce_dtype(job: JobConfig) -> torch.dtype:
    """Return the dtype in which FSDP2 sends and sums gradients."""
    return torch.bfloat16 if job.parallel.fsdp_reduce_dtype == "bfloat16" else torch.float32


def build_mesh(job: JobConfig, device: torch.device) -> DeviceMesh | None:
    """Return the mesh over all ranks: (shard), or (replicate, shard) for HSDP; none without ranks.
    Raises JobError when fsdp_shard_size does not divide the number of workers.
    """
    if not dist.is_initialized():
        return None
    world = dist.get_world_size()
    shard = job.parallel.fsdp_shard_size or world
    if world % shard:
        raise JobError(
            "fsdp_shard_size must divide the number of workers",
            f"fsdp_shard_size: {shard}, workers: {world}",
            f"choose a divisor of {world}, or leave fsdp_shard_size out",
        )
    if shard == world:
        return init_device_mesh(device.type, (world,), mesh_dim_names=(SHARDED,))
    return init_device_mesh(
        device.type, (world // shard, shard), mesh_dim_names=("replicate", SHARDED)
    )


def parameter_device(job: JobConfig) -> torch.device | None:
    """Return where parameters live if not on the device that computes."""
    return torch.device("cpu") if job.parallel.fsdp_cpu_offload else None


def needs_fsdp(job: JobConfig, mesh: DeviceMesh | None) -> bool:
    """Whether fully_shard has anything to do: ranks to share with, or CPU offload.

    With nothing to do FSDP2 would still copy every parameter and gradient (8 % of a step on an
    H200).
    """
    return mesh is not None and (mesh.size() > 1 or job.parallel.fsdp_cpu_offload)


def shard(
    model: PreTrainedModel, job: JobConfig, mesh: DeviceMesh | None, copies: bool = False
) -> None:
    """Apply activation checkpointing, compilation and FSDP2 in place: a unit of each layer, of the
    embedding and of the head, which are gathered only where they compute, and of the rest.

    Args:
        copies: whether bytes are moved by copies between the GPUs of this host (peer_copies).

    The checkpoint wrapper goes inside fully_shard: before PyTorch 2.13 the recomputation skips
    FSDP2's mixed-precision cast of the inputs when its hooks are inside the checkpoint.
    """
    mode = checkpointing_mode(job)
    if job.parallel.torch_compile:
        require_compiled()
        if not job.parallel.use_cpu:
            refuse_wrong_slices(model, versions(["triton"])["triton"])
    shard_module = None
    if needs_fsdp(job, mesh):
        copied = _copying(job, mesh) if copies and mesh is not None else None
        shard_module = _sharder(job, mesh, _sum_dtype(model, job, mesh, copies), copied)
    frozen = set[nn.Parameter]()
    if mode != "none" or shard_module is not None:
        _refuse_shared(model)
    if shard_module is not None:
        Transforms(job).before_sharding(model)
        frozen = _shard_float32(model, job, shard_module)
    casts, layers = shard_module is None and _casts(model, job), list[nn.Module]()
    for fqn, layer in decoder_layers(model):
        whole = layer
        if mode != "none":
            whole = _checkpointed(layer, mode)
            model.set_submodule(fqn, whole)
        unit = layer if casts and recomputes_casts(job) else whole
        if casts:
            _cast(model, unit, job)
        if job.parallel.torch_compile:
            unit.compile(fullgraph=False)
        if shard_module is not None:
            shard_module(whole, ignored_params=frozen)
        layers.append(whole)
    if job.parallel.activation_offloading:
        Offload(layers, num_offloaded(job, len(layers)))
    if shard_module is not None:
        if alone := ends(model, job):
            embedding, head = (shard_module(end, ignored_params=frozen) for end in alone)
            embedding.set_unshard_in_backward(False)  # its gradient needs no weight
            head.set_reshard_after_forward(False)  # backward begins with it
        shard_module(model, ignored_params=frozen)
    if casts:
        _cast(model, model, job)


def ends(model: PreTrainedModel, job: JobConfig) -> tuple[nn.Module, ...]:
    """Return the embedding and the head if each can be a unit of FSDP2: plain, not tied, and called
    wherever their weights are computed with. With CPU offload they stay in the rest's unit.
    """
    both: tuple[Any, Any] = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call] # transformers' own
    embedding, head = both
    plain = type(embedding) is nn.Embedding and type(head) is nn.Linear
    if not plain or head.weight is embedding.weight or job.parallel.fsdp_cpu_offload:
        return ()
    names = {module: name for name, module in model.named_modules()}
    if any(is_read(model, names[end]) for end in (embedding, head)):
        return ()
    return embedding, head


def _casts(model: PreTrainedModel, job: JobConfig) -> bool:
    """Whether there are parameters of another dtype than the one that computes."""
    kept, dtype = keeps_float32(model), compute_dtype(job)
    return any(
        p.is_floating_point() and p.dtype != dtype and not kept(n)
        for n, p in model.named_parameters()
    )


def _cast(model: PreTrainedModel, unit: nn.Module, job: JobConfig) -> None:
    """Make a layer, or the rest of the model, compute in the compute dtype, as FSDP2 would."""
    apart = (
        [] if unit is not model else [p for _, x in decoder_layers(model) for p in x.parameters()]
    )
    kept = {p for n, p in model.named_parameters() if keeps_float32(model)(n)} | set(apart)
    cast_in_forward(unit, compute_dtype(job), kept.__contains__)


def require_compiled() -> None:
    """Have torch.compile raise instead of running a layer eager once it was compiled too often.

    All layers of a kind count as one, for training, evaluation, features on and off, and lengths:
    its default of 8 is soon reached.
    """
    torch._dynamo.config.recompile_limit = max(MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def refuse_wrong_slices(model: PreTrainedModel, triton: str | None) -> None:
    """Refuse layers whose code assigns to every third element: Triton before 3.8 stores those
    wrongly when compiled (pytorch/pytorch#193183; torch 2.12 and 2.13). The rotary tables of
    interleaved M-RoPE do so too, outside of the layers, which are all that is compiled. Remove when
    the oldest torch has Triton 3.8. Raises TrainingError, naming the first module.
    """
    if triton is None or Version(triton) >= Version("3.8"):
        return
    for fqn, layer in decoder_layers(model):
        for name, module in layer.named_modules(prefix=fqn):
            kind: Any = type(module)
            if EVERY_THIRD.search(_source(kind)):
                raise TrainingError(
                    "torch_compile would give wrong numbers for slices of every third element",
                    f"{name} ({kind.__name__}), Triton {triton} (pytorch/pytorch#193183)",
                    "set torch_compile: false, or install a PyTorch with Triton 3.8 or newer",
                )


@cache
def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # made while running, by a library
        return ""


def refuse_eager(train: Callable[P, T]) -> Callable[P, T]:
    """Turn torch.compile giving up, anywhere in a run, into a TrainingError."""

    @wraps(train)
    def run(*arguments: P.args, **named: P.kwargs) -> T:
        try:
            return train(*arguments, **named)
        except FailOnRecompileLimitHit as error:
            raise TrainingError(
                f"torch.compile would leave a layer eager: it was compiled {MOST_GRAPHS} times",
                first_line(error.__context__ or error),
                "set packing: true, which leaves one length, or torch_compile: false",
            ) from error

    return run


def _checkpointed(layer: nn.Module, mode: str) -> nn.Module:
    options: dict[str, Any] = {"checkpoint_impl": CheckpointImpl.NO_REENTRANT}
    if mode != "full":
        kept = set(KEPT_OPERATORS if mode == "selective" else ATTENTION)
        if any(vars(module).get("has_bias", False) for module in layer.modules()):
            # transformers adds the experts' bias to the product in place.
            kept.discard(torch.ops.aten._grouped_mm.default)
        policy = partial(_keep_expensive, kept)
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    wrapped: nn.Module = checkpoint_wrapper(layer, **options)
    return wrapped


def _keep_expensive(
    kept: Collection[Any], context: Any, operator: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    keep = operator in kept or _is_flash_attention(str(operator))
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _sum_dtype(
    model: PreTrainedModel, job: JobConfig, mesh: DeviceMesh | None, copies: bool
) -> torch.dtype:
    """Return the dtype of FSDP2's sums. Copies sum in float32 themselves: where gradients are kept
    in bf16, and no all-reduce follows, they round once, and need no pass over memory for it.
    """
    kept = {p.dtype for p in model.parameters() if p.requires_grad}
    once = copies and mesh is not None and mesh.ndim == 1 and kept == {torch.bfloat16}
    return torch.bfloat16 if once else reduce_dtype(job)


def _copying(job: JobConfig, mesh: DeviceMesh) -> Callable[[FSDPModule], None]:
    """Return what has a unit moved by copies."""
    from raytrain_adv.ops.peer_copies import PeerAllGather, PeerReduceScatter, pools

    gathers, reductions = pools(mesh.get_group(SHARDED), job.parallel.ddp_timeout)

    def copied(unit: FSDPModule) -> None:
        unit.set_custom_all_gather(PeerAllGather(gathers))
        unit.set_custom_reduce_scatter(PeerReduceScatter(reductions, compute_dtype(job)))

    return copied


def _sharder(
    job: JobConfig,
    mesh: DeviceMesh | None,
    sum_dtype: torch.dtype,
    copied: Callable[[FSDPModule], None] | None,
) -> Callable[..., FSDPModule]:
    options = job.parallel
    offload = OffloadPolicy()
    if options.fsdp_cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=mesh is not None and mesh.device_type == "cuda")
    apply = partial(
        fully_shard,
        mesh=mesh,
        # The rest too, which FSDP2 by itself would leave whole: a tied head would stay over the
        # loss, where memory peaks.
        reshard_after_forward=options.fsdp_reshard_after_forward is not False,
        # Layers take some inputs in float32: rotary tables, residual streams.
        mp_policy=MixedPrecisionPolicy(
            param_dtype=compute_dtype(job),
            reduce_dtype=sum_dtype,
            cast_forward_inputs=False,
        ),
        offload_policy=offload,
    )

    def shard_module(module: nn.Module, **others: Any) -> FSDPModule:
        unit = apply(module, **others)
        if copied is not None and "mp_policy" not in others:
            copied(unit)
        return unit

    return shard_module


def _refuse_shared(model: PreTrainedModel) -> None:
    """Refuse layers that have parameters in common: FSDP2 gathers each layer's for itself. Raises
    JobError, naming the parameters.
    """
    layers = decoder_layers(model)
    counts = Counter(p for _, layer in layers for p in layer.parameters())
    names = [name for name, p in model.named_parameters() if counts[p] > 1]
    if names:
        raise JobError(
            f"{type(model).__name__} has layers that share weights",
            f"{listed(names, 3)}: neither sharded, cast to bf16 nor recomputed",
            "train it on one worker with bf16: false and disable_gradient_checkpointing: true",
        )


def _shard_float32(
    model: PreTrainedModel, job: JobConfig, shard_module: Callable[..., FSDPModule]
) -> set[nn.Parameter]:
    """Shard modules apart, computing in float32, whose parameters transformers keeps in float32;
    return frozen ones beside others, which stay whole on each worker. Raises JobError with
    pure_bf16, for trained ones beside others: FSDP2 gathers one dtype.
    """
    keeps = keeps_float32(model)
    if compute_dtype(job) is torch.float32:
        return set()
    policy = MixedPrecisionPolicy(torch.float32, torch.float32, cast_forward_inputs=False)
    kept = {name: p for name, p in model.named_parameters() if keeps(name)}
    for fqn, module in list(model.named_modules()):
        names = [f"{fqn}.{name}" for name, _ in module.named_parameters()]
        if not names or isinstance(module, FORWARDLESS) or is_read(model, fqn):
            continue  # what is never called would stay sharded
        if kept.keys() >= set(names):
            shard_module(module, mp_policy=policy)
            for name in names:
                del kept[name]
    frozen = {p for p in kept.values() if not p.requires_grad}
    if job.train.pure_bf16 and (mixed := [n for n, p in kept.items() if p.requires_grad]):
        raise JobError(
            f"pure_bf16: {type(model).__name__} keeps parameters in float32 beside others",
            ", ".join(mixed[:4]),
            "set bf16: true instead of pure_bf16",
        )
    return frozen


def _is_flash_attention(operator: str) -> bool:
    """Whether it is the forward pass of a package's or the Hub's flash attention, by its name."""
    return "flash_attn" in operator and ("fwd" in operator or "forward" in operator)
