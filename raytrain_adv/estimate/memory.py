"""Predict the memory that a worker's GPU needs, from the model's shapes alone.

The moments of a step are added up one by one, and the largest counts. The prediction is of
torch.cuda.max_memory_allocated; the CUDA context and fragmentation come in addition (`RESERVE`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from raytrain_adv.checkpoint.staging import LARGEST_SHARE
from raytrain_adv.config.job import JobConfig, accumulation
from raytrain_adv.estimate.flops import text_config
from raytrain_adv.estimate.launches import why_no_graph
from raytrain_adv.estimate.passes import Passes, head_loss
from raytrain_adv.estimate.sizes import HostCopies, States, reference_bytes
from raytrain_adv.model.offload import num_offloaded
from raytrain_adv.model.parallel import (
    checkpointing_mode,
    compute_dtype,
    recomputes_casts,
    reduce_dtype,
)
from raytrain_adv.ops.bitsandbytes.linear import num_weights, packed_linears
from raytrain_adv.ops.loss.function import CHUNK_TOKENS
from raytrain_adv.text import GIB, listed
from raytrain_adv.transforms.tiled_mlp import TiledMlp

GATHERED_AHEAD = 2  # layers that are whole at a time: the computing and the prefetched one
COPY_BUFFERS = 3  # of the largest unit, where copies replace NCCL: two gathered, one reduced
GPUS_OF_A_HOST = 8  # at most, for the prediction
WORKSPACE_BYTES = 96 * 2**20
PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "gathered", "workspace")
ROOM = 0.15  # share of a GPU's memory that stays free where layers are kept without a key
RESERVE = 0.06  # share of a GPU's memory to leave free: CUDA context, NCCL buffers, fragmentation


@dataclass(frozen=True)
class Phase:
    """GPU memory at one moment of a training step, in GiB."""

    name: str
    parameters: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    gathered: float = 0.0
    workspace: float = WORKSPACE_BYTES / GIB

    @property
    def total(self) -> float:
        """The sum, in GiB."""
        return float(sum(getattr(self, part) for part in PARTS))


@dataclass(frozen=True)
class MemoryPrediction:
    """Predicted peak memory of one worker, in GiB. Each of PARTS has its own largest size."""

    parameters: float  # shard of one worker; also of gradients and optimizer states
    gradients: float
    optimizer: float
    activations: float  # kept for backward, and temporaries of a layer's backward pass
    logits: float  # logits, their gradient, and the loss's own copies
    gathered: float  # whole parameters and gradients of the layers FSDP2 is working on
    workspace: float  # cuBLAS and attention workspaces, rotary tables, token ids
    total: float  # the largest moment: less than the sum of the parts
    peak: str  # name of that moment
    phases: tuple[Phase, ...]  # the moments of a step, in order
    host: float  # host memory per worker of offloaded states
    host_activations: float  # host memory per worker of activations
    copies: HostCopies  # host memory per worker for checkpoints
    explanations: dict[str, str]  # part -> explanation of its size

    def fits(self, memory_gib: float) -> bool:
        """Whether a GPU with this memory has room, with RESERVE left free."""
        return self.total <= memory_gib * (1 - RESERVE)

    def as_dict(self) -> dict[str, Any]:
        """Return the prediction as JSON types."""
        return {**asdict(self), "phases": [{**asdict(p), "total": p.total} for p in self.phases]}


@dataclass(frozen=True)
class HostNeed:
    """Host memory of a node's workers in GiB; without Python and PyTorch, some 3 GiB a worker, and
    the node's own processes. All but `workers` are per worker.
    """

    workers: int  # most workers on the node
    offloaded: float  # parameters, gradients and optimizer states under fsdp_cpu_offload
    activations: float  # what activation_offloading moves, page-locked
    kept: float  # copies of checkpoints, kept for the run
    new: float  # new copies for each checkpoint

    @staticmethod
    def of(memory: MemoryPrediction, workers: int) -> HostNeed:
        """Return the need of this many workers on a node."""
        offloaded = (memory.host, memory.host_activations)
        return HostNeed(workers, *offloaded, memory.copies.kept, memory.copies.new)

    @property
    def per_worker(self) -> float:
        """The need of one worker."""
        return self.offloaded + self.activations + self.kept + self.new

    @property
    def per_node(self) -> float:
        """The need of the node's workers."""
        return self.workers * self.per_worker

    @property
    def least_free_to_lock(self) -> float:
        """Free host memory with which the kept copies are page-locked."""
        return self.workers * self.kept / LARGEST_SHARE

    def sentence(self) -> str:
        """Return the need in a sentence."""
        named = {
            "offloaded": self.offloaded,
            "activations": self.activations,
            "copies of checkpoints, kept for the run": self.kept,
            "new copies for each checkpoint": self.new,
        }
        needed = {what: gib for what, gib in named.items() if gib >= 0.05}
        parts = [f"{gib:.1f} {what}" if len(needed) > 1 else what for what, gib in needed.items()]
        node = f", {self.per_node:.1f} GiB on a node of {self.workers}" if self.workers > 1 else ""
        return f"{self.per_worker:.1f} GiB per worker{node}: {'; '.join(parts)}"

    def verdict(self, node_gib: float | None) -> str:
        """Return whether copies are page-locked on a node with this much host memory, if known."""
        if node_gib is not None and self.per_node > node_gib:
            return f"does not fit: this node has {node_gib:.0f} GiB of host memory"
        if node_gib is not None and self.least_free_to_lock > node_gib:
            return (
                f"not page-locked on this node of {node_gib:.0f} GiB: copies would be more than "
                "half of it; steps wait longer for checkpoints"
            )
        if not self.kept:
            return ""
        known = "" if node_gib is None else f" (this node has {node_gib:.0f})"
        return (
            f"page-locked where a node has {self.least_free_to_lock:.1f} GiB free{known}, "
            "twice the copies; else steps wait longer for checkpoints"
        )


def predict(
    model: PreTrainedModel, job: JobConfig, world_size: int, seq_len: int, batch: int
) -> MemoryPrediction:
    """Predict the peak memory of each worker, of a model after its transforms and before sharding
    (the meta device is enough), for passes of `batch` sequences of `seq_len` tokens with padding.
    """
    states = States.of(model, job, world_size)
    passes = Passes.of(model, job, seq_len, batch)
    tokens = batch * seq_len // job.parallel.sequence_parallel_size
    graphed = not why_no_graph(model, job, world_size, tokens)
    # The gradients of a CUDA graph stay where they are.
    phases = _phases(states, passes, job, accumulation(job, world_size) > 1 or graphed)
    reference = reference_bytes(model, job, states.shard_size) / GIB
    if reference:
        known = tokens * text_config(model).vocab_size * compute_dtype(job).itemsize / GIB
        phases = tuple(
            replace(
                p,
                parameters=p.parameters + reference,
                logits=p.logits + (known if p.name == "loss" else 0.0),
            )
            for p in phases
        )
    host = 0.0
    if job.parallel.fsdp_cpu_offload:
        host = reference + states.parameters + states.gradients + states.optimizer
        phases = tuple(replace(p, parameters=0.0, gradients=0.0, optimizer=0.0) for p in phases)
    peak = max(phases, key=lambda phase: phase.total)
    return MemoryPrediction(
        **{part: max(getattr(p, part) for p in phases) for part in PARTS},
        total=peak.total,
        peak=peak.name,
        phases=phases,
        host=host,
        host_activations=passes.on_host,
        copies=HostCopies.of(model, job, world_size),
        explanations=_explanations(model, job, states, tokens),
    )


def settled(
    model: PreTrainedModel,
    job: JobConfig,
    world_size: int,
    seq_len: int,
    batch: int,
    memory_gib: float | None,
) -> JobConfig:
    """Return the job with fsdp_reshard_after_forward decided by the memory of a GPU: layers stay
    gathered between forward and backward where ROOM of it is left. Arguments as of `predict`.
    """
    set_already = job.parallel.fsdp_reshard_after_forward is not None
    if set_already or memory_gib is None or world_size == 1 or job.parallel.use_cpu:
        return job
    kept = {"fsdp_reshard_after_forward": False}
    keeping = replace(job, parallel=job.parallel.model_copy(update=kept))
    need = predict(model, keeping, world_size, seq_len, batch).total
    return keeping if need <= memory_gib * (1 - ROOM) else job


def _phases(s: States, a: Passes, job: JobConfig, accumulates: bool) -> tuple[Phase, ...]:
    """Return the moments of a step; the optimizer's states exist from the second step on."""
    earlier = s.gradients if accumulates else 0.0
    w = _Whole.sharded(s, job) if s.is_sharded else _Whole.copies(s, job)
    one = a.recomputed + a.temporaries
    last, first = a.kept + one + a.returning_first, a.kept_by_one + one + a.returning
    g = _Gradients.sharded(s, job, earlier) if s.is_sharded else _Gradients.whole(s, earlier)
    moments: list[tuple[str, float, float, float, float]] = [
        # name, gradients, activations, logits, gathered
        ("loss", earlier, a.kept + a.final, a.logits, w.loss),
        ("backward, head", g.first, a.kept + a.final, a.logits_gradient, w.head + g.head_reducing),
        ("backward, last layer", g.first, last, 0.0, w.last + g.reducing),
        ("backward, first layer", g.last, first, 0.0, w.first + g.reducing),
        ("backward, end", s.gradients, 0.0, 0.0, s.root + s.root_copy + g.end_reducing),
        ("optimizer step", s.gradients, s.optimizer_temporaries, 0.0, 0.0),
    ]
    if a.logits_eval:
        moments += [
            ("evaluation, layers", 0.0, a.layer_eval, 0.0, w.layer_eval),
            ("evaluation", 0.0, 0.0, a.logits_eval, w.head_eval),
        ]
    copied = s.is_sharded and moves_by_copies(job, s.shard_size)
    buffers = COPY_BUFFERS * s.largest_unit if copied else 0.0
    return tuple(
        Phase(name, s.parameters, gradients, s.optimizer, activations, logits, whole + buffers)
        for name, gradients, activations, logits, whole in moments
    )


def moves_by_copies(job: JobConfig, shard_size: int) -> bool:
    """Whether FSDP2's collectives are taken to be copies: the workers of a copy of the model may
    share a host.
    """
    wanted = job.parallel.fsdp_collectives
    elsewhere = job.parallel.use_cpu or job.parallel.fsdp_cpu_offload or wanted == "nccl"
    return not elsewhere and (wanted == "copies" or 1 < shard_size <= GPUS_OF_A_HOST)


@dataclass(frozen=True)
class _Whole:
    """Whole parameters in the compute dtype, in GiB: gathered by FSDP2, or copies of float32 ones.
    `last` and `first` are of layers, in their backward passes.
    """

    loss: float
    head: float
    last: float
    first: float
    layer_eval: float
    head_eval: float

    @staticmethod
    def sharded(s: States, job: JobConfig) -> _Whole:
        """Return those that FSDP2 gathers."""
        kept = job.parallel.fsdp_reshard_after_forward is False
        stays = s.root + s.layer * s.num_layers if kept else 0.0
        layers = max(stays, s.root + GATHERED_AHEAD * s.layer)
        head = max(stays, s.root) + s.head
        return _Whole(stays + s.head, head, layers, layers, layers, head)

    @staticmethod
    def copies(s: States, job: JobConfig) -> _Whole:
        """Return the copies of one worker: backward needs them, except those that it makes."""
        kept = 0.0 if recomputes_casts(job) else s.layer_copy * s.num_layers
        root, one = s.root_copy, s.layer_copy
        return _Whole(root + kept, root + kept, root + max(kept, one), root + one, root + one, root)


@dataclass(frozen=True)
class _Gradients:
    """Gradients during a backward pass, in GiB."""

    first: float  # when the last layer's backward pass begins
    last: float  # during the first layer's backward pass
    head_reducing: float = 0.0  # the head's whole gradient: FSDP2 reduces it last
    reducing: float = 0.0  # a layer's gradients in the reduction, and the head's
    end_reducing: float = 0.0  # the head's and the embedding's gradients in the reduction

    @staticmethod
    def whole(s: States, earlier: float) -> _Gradients:
        """Return those without FSDP2: the first layer's and the embedding's come last."""
        missing = s.layer_gradient + (0.0 if s.is_tied else s.embedding_gradient)
        return _Gradients(
            first=max(earlier, s.head_gradient),
            last=earlier or s.gradients - missing,
            end_reducing=s.embedding_gradient if s.is_tied or earlier else 0.0,
        )

    @staticmethod
    def sharded(s: States, job: JobConfig, earlier: float) -> _Gradients:
        """Return those with FSDP2: in the compute dtype, copied to that of the sum, summed."""
        with_copy = 1 + reduce_dtype(job).itemsize / compute_dtype(job).itemsize
        head = 0.0 if s.head else s.head_gradient  # reduced after the layers, with the rest
        embedding = 0.0 if s.is_tied else s.embedding_gradient
        return _Gradients(
            first=earlier,
            last=s.gradients,
            head_reducing=s.head_gradient * (with_copy if s.head else 1),
            reducing=s.layer_gradient * with_copy + head,
            end_reducing=(head + embedding) * with_copy,
        )


def dtypes(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the kinds of the packed weights, and the dtypes of the parameters."""
    plain = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    return (*sorted({m.form.kind for _, m in packed_linears(model)}), *sorted(plain))


def _explanations(
    model: PreTrainedModel, job: JobConfig, states: States, tokens: int
) -> dict[str, str]:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    over = f", over {states.shard_size} workers" if states.shard_size > 1 else ""
    optimizer = "of 8 bits" if job.train.optim == "adamw_torch_8bit" else "in the parameters' dtype"
    count = "one state of matrices, two of others," if job.train.optim == "muon" else "two states"
    again = ", and ASFT's reference" if job.train.use_asft_loss else ""
    kept = {
        "none": "everything backward needs is kept",
        "selective": "results of matrix products and attention are kept",
        "attention": "each layer's input and attention's result are kept",
        "full": "each layer's input is kept",
    }[checkpointing_mode(job)]
    if moved := num_offloaded(job, states.num_layers):
        kept += f", of the first {moved} layers in host memory"
    if job.transform(TiledMlp).enabled:
        kept += f"; MLPs compute {job.transform(TiledMlp).tokens:,} tokens at a time"
    how = "compiled layers" if job.parallel.torch_compile else "eager layers"
    copies = "" if job.parallel.torch_compile else f", float32 {CHUNK_TOKENS} tokens at a time"
    logits = f"{tokens:,} x {text_config(model).vocab_size:,}, and their gradient{copies}"
    if in_head := head_loss(model):
        logits = (
            f"{in_head.kernel}: never of all {tokens:,} tokens; with the gradients of the head and "
            "its input"
        )
    alone = "nothing: one worker, no FSDP2"
    if states.layer_copy:
        alone = "copies of float32 parameters in the compute dtype"
    stay = job.parallel.fsdp_reshard_after_forward is False
    gathered = f"whole layers {'from forward to backward' if stay else 'where FSDP2 computes'}"
    if states.is_sharded and moves_by_copies(job, states.shard_size):
        buffers = COPY_BUFFERS * states.largest_unit
        gathered += f", and {buffers:.1f} GiB of buffers that the host's other GPUs read"
    return {
        "parameters": f"{num_weights(model):,} in {listed(dtypes(model))}{again}{over}",
        "gradients": f"of {trained:,} trained parameters{over}",
        "optimizer": f"{count} {optimizer}{over}",
        "activations": f"{tokens:,} tokens, {how}; {kept}",
        "logits": logits,
        "gathered": gathered if states.is_sharded else alone,
        "workspace": "of cuBLAS and attention, rotary tables, token ids",
    }
