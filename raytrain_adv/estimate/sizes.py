"""The sizes behind a prediction of memory: states, and copies of checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.model.build import decoder_layers, parameter_dtype
from raytrain_adv.model.parallel import compute_dtype, ends
from raytrain_adv.ops.bitsandbytes.linear import num_weights
from raytrain_adv.text import GIB
from raytrain_adv.transforms.modules import in_adapter, inner_matrices

BLOCK_OF_8BIT = 256
STATE_BYTES_IN_8BIT = 1 + 4 / BLOCK_OF_8BIT  # torchao: a byte a value, a float32 scale a block
SMALLEST_IN_8BIT = 4096  # parameters with fewer elements keep plain states in torchao's


@dataclass(frozen=True)
class States:
    """The model's states, and those parts that FSDP2 gathers temporarily; in GiB."""

    parameters: float
    gradients: float
    optimizer: float
    head_gradient: float  # whole; likewise the embedding's, which is the same tensor if tied
    embedding_gradient: float
    layer_gradient: float  # whole gradient of one layer, in the dtype of backward
    root: float  # whole parameters outside all other units, in the compute dtype; 0 without FSDP2
    layer: float  # whole parameters of one layer, likewise
    head: float  # of the head if it is a unit of its own
    largest_unit: float  # of the largest unit
    root_copy: float  # copies in the compute dtype without FSDP2, outside the layers
    layer_copy: float  # of one layer, likewise
    optimizer_temporaries: float  # temporaries of the optimizer's step
    num_layers: int
    shard_size: int
    is_tied: bool

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 is applied."""
        return self.layer > 0

    @staticmethod
    def of(model: PreTrainedModel, job: JobConfig, world_size: int) -> States:
        """Compute the sizes of a model."""
        size, shards = compute_dtype(job).itemsize, shard_size(job, world_size)
        # As in model/parallel.py, where fully_shard is applied.
        sharded = world_size > 1 or job.parallel.fsdp_cpu_offload
        layers = [layer for _, layer in decoder_layers(model)]
        largest = max(layers, key=num_elements)
        alone = ends(model, job) if sharded else ()
        root = num_elements(model) - sum(map(num_elements, (*layers, *alone)))
        trained = [p for p in model.parameters() if p.requires_grad]
        grad_sizes = {p: size if sharded else p.element_size() for p in trained}
        head, embedding = head_of(model), model.get_input_embeddings()

        def cast(module: nn.Module) -> int:
            kept = (p for p in module.parameters() if p.is_floating_point())
            return sum(p.numel() for p in kept if p.dtype != compute_dtype(job))

        def gradient(module: nn.Module | None) -> float:
            parameters = module.parameters() if module is not None else ()
            return sum(p.numel() * grad_sizes.get(p, 0) for p in parameters) / GIB

        return States(
            parameters=num_bytes(model.parameters()) / shards / GIB,
            gradients=num_bytes(trained) / shards / GIB,
            optimizer=optimizer_bytes(model, job, shards) / GIB,
            optimizer_temporaries=step_bytes(trained, job, shards, sharded) / GIB,
            head_gradient=gradient(head),
            embedding_gradient=gradient(embedding),
            layer_gradient=gradient(largest),
            root=root * size / GIB if sharded else 0.0,
            layer=num_elements(largest) * size / GIB if sharded else 0.0,
            head=num_elements(alone[1]) * size / GIB if alone else 0.0,
            largest_unit=max(root, *map(num_elements, (largest, *alone))) * size / GIB,
            root_copy=0.0 if sharded else (cast(model) - sum(map(cast, layers))) * size / GIB,
            layer_copy=0.0 if sharded else cast(largest) * size / GIB,
            num_layers=len(layers),
            shard_size=shards,
            is_tied=head is not None and head.weight is embedding.weight,
        )


def head_of(model: PreTrainedModel) -> nn.Module | None:
    """Return the module that makes logits, if the model has one."""
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call] # transformers' own
    return head


def shard_size(job: JobConfig, world_size: int) -> int:
    """Return the ranks that share a copy of the model."""
    return min(job.parallel.fsdp_shard_size or world_size, world_size)


def num_rows(parameter: nn.Parameter) -> tuple[int, int]:
    """Return the rows that FSDP2 splits a parameter along, and the elements of a row."""
    rows = parameter.shape[0] if parameter.ndim else 1
    return rows, parameter.numel() // max(rows, 1)


def num_elements(module: nn.Module) -> int:
    """Return the stored elements of all parameters, tied ones counted once."""
    return sum(p.numel() for p in module.parameters())


def num_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Return the bytes of all the parameters."""
    return sum(p.numel() * p.element_size() for p in parameters)


def optimizer_bytes(model: nn.Module, job: JobConfig, shards: int) -> float:
    """Return the bytes of the optimizer's states per worker."""
    with_one = _with_one_state(model, job)
    total = 0.0
    for p in (p for p in model.parameters() if p.requires_grad):
        in_8bit = has_8bit_states(p, job, shards)
        each = p.numel() / shards * (STATE_BYTES_IN_8BIT if in_8bit else p.element_size())
        total += each * (1 if p in with_one else 2)
    return total


def _with_one_state(model: nn.Module, job: JobConfig) -> set[nn.Parameter]:
    """Return the parameters of which the optimizer keeps the momentum alone: Muon's."""
    return set(inner_matrices(model)) if job.train.optim == "muon" else set()


def reference_bytes(model: nn.Module, job: JobConfig, shards: int) -> float:
    """Return the bytes per worker of ASFT's reference: the model as it was read, a second time."""
    if not job.train.use_asft_loss:
        return 0.0
    adapters = sum(p.numel() for fqn, p in model.named_parameters() if in_adapter(fqn))
    return (num_weights(model) - adapters) * parameter_dtype(job).itemsize / shards


@dataclass(frozen=True)
class HostCopies:
    """A worker's copies of checkpoints in host memory, in GiB; see checkpoint/host_memory.py."""

    kept: float  # allocated after the first step and kept; page-locked if the node has room
    new: float
    """Allocated for each checkpoint until it is written: states that are already in host memory,
    and 8-bit states, which are copied as float32."""

    @staticmethod
    def of(model: nn.Module, job: JobConfig, world_size: int) -> HostCopies:
        """Compute the first worker's shard, the largest; each worker copies its own."""
        if job.output.save_strategy == "no":
            return HostCopies(0.0, 0.0)
        shards = shard_size(job, world_size)
        with_states = not job.output.save_only_model
        kept = new = 0.0
        with_one = _with_one_state(model, job)
        for p in (p for p in model.parameters() if p.requires_grad):
            rows, row = num_rows(p)
            local = -(-rows // shards) * row
            kept += local * p.element_size()
            if with_states and has_8bit_states(p, job, shards):
                new += 2 * 4 * local
            elif with_states:
                kept += (1 if p in with_one else 2) * local * p.element_size()
        if job.parallel.use_cpu or job.parallel.fsdp_cpu_offload:
            kept, new = 0.0, kept + new
        return HostCopies(kept / GIB, new / GIB)


def has_8bit_states(parameter: nn.Parameter, job: JobConfig, shards: int) -> bool:
    """Whether torchao's optimizer keeps a parameter's states in 8 bits."""
    local = parameter.numel() / shards
    is_large = local >= SMALLEST_IN_8BIT and local % BLOCK_OF_8BIT == 0
    return job.train.optim == "adamw_torch_8bit" and is_large


def step_bytes(trained: list[nn.Parameter], job: JobConfig, shards: int, sharded: bool) -> float:
    """Return the temporary bytes of an optimizer step: none if it is fused."""
    largest = max(trained, key=lambda p: p.numel())
    if job.train.optim == "adamw_torch_8bit":
        # Parameter by parameter, with both states in float32.
        return 2 * 4 * largest.numel() / shards
    if job.train.optim == "adamw_torch":
        # Of sharded parameters one by one, else of all at once: the denominator of the update.
        each = 2 * largest.numel() * largest.element_size()
        return (each if sharded else num_bytes(trained)) / shards
    if job.train.optim == "muon":
        # One matrix at a time, whole: its update, and in bfloat16 two forms of it and two products
        # of it with itself. Source: torch.optim._muon's _zeropower_via_newtonschulz.
        matrix = max((p for p in trained if p.ndim == 2), key=lambda p: p.numel(), default=largest)
        smaller = min(matrix.shape)
        return matrix.numel() * (matrix.element_size() + 2 * 2) + 2 * 2 * smaller * smaller
    return 0.0
