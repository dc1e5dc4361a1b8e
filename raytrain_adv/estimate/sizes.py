"""The sizes behind a prediction of memory: states, passes, logits, copies of checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.estimate.activations import AttentionKind, Layer, read_layer
from raytrain_adv.estimate.flops import layer_configs, text_config
from raytrain_adv.model.build import decoder_layers, parameter_dtype
from raytrain_adv.model.offload import num_offloaded
from raytrain_adv.model.parallel import checkpointing_mode, compute_dtype, ends
from raytrain_adv.ops.bitsandbytes.linear import num_weights, packed_linears
from raytrain_adv.ops.float8.head_loss import Float8Head, workspace
from raytrain_adv.ops.loss.function import CHUNK_TOKENS
from raytrain_adv.ops.loss.head import HeadLoss, loss_head, loss_of
from raytrain_adv.ops.loss.linear_cross_entropy import MOST_ROUNDINGS, chunk_tokens
from raytrain_adv.text import GIB
from raytrain_adv.transforms.modules import in_adapter, inner_matrices
from raytrain_adv.transforms.tiled_mlp import TiledMlp, mlps

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
        head, embedding = _head(model), model.get_input_embeddings()

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


@dataclass(frozen=True)
class Passes:
    """Memory of forward and backward for a micro-batch, in GiB."""

    kept: float  # kept for backward, over all layers
    kept_by_one: float  # one layer's part of it
    recomputed: float  # recomputed during one layer's backward pass
    temporaries: float  # activation gradients in one layer's backward pass, and an unpacked weight
    logits: float  # logits, their gradient and the loss's copies, at most
    logits_gradient: float  # the gradient into the head's backward pass, or from the head's loss
    logits_eval: float  # logits and the loss's copies in evaluation; 0 without held-out rows
    layer_eval: float  # a layer's input, output and inner activations in an evaluation pass
    on_host: float  # kept for backward in host memory

    @staticmethod
    def of(model: PreTrainedModel, job: JobConfig, seq_len: int, batch: int) -> Passes:
        """Compute the sizes from the layers' shapes. Each of the workers that share sequences has
        a part of the tokens, and of all tokens' scores those of a part of the heads.
        """
        config, size = text_config(model), compute_dtype(job).itemsize
        mode, compiled = checkpointing_mode(job), job.parallel.torch_compile
        kind = attention_kind(config, job)
        each = layer_configs(config)
        on_worker = seq_len // job.parallel.sequence_parallel_size
        tiles = _Tiles.of(model, job, batch * on_worker)
        layers = [
            tiles.of_layer(fqn, read_layer(layer, each[min(number, len(each) - 1)]))
            for number, (fqn, layer) in enumerate(decoder_layers(model))
        ]
        whole = [
            (x.kept_compiled if compiled else x.kept_eager)(size, kind, seq_len) for x in layers
        ]
        kept, recomputed = whole, 0.0
        if mode == "selective":
            kept = [x.kept_selective(size, compiled) for x in layers]
            recomputed = max(max(w - k, 0.0) for w, k in zip(whole, kept, strict=True))
        elif mode != "none":
            results = [x.query_width if mode == "attention" else 0 for x in layers]
            kept = [float(size * (x.hidden + n)) for x, n in zip(layers, results, strict=True)]
            recomputed = max(w - size * n for w, n in zip(whole, results, strict=True))
        # The final norm runs uncompiled: float32 copy, normalized form, the head's input.
        final: float = (4 + 2 * size) * config.hidden_size
        if mode == "attention":
            final += sum(4 * x.heads for x in layers)  # which stay on the GPU
        unit = batch * on_worker / GIB
        backward = max(x.backward_temporaries(size, kind, seq_len) for x in layers)
        # Packed linears are unpacked one at a time.
        unpacked = [m.temporary_bytes for _, m in packed_linears(model)]
        evaluates = bool(job.data.val_size or job.data.eval_dataset)
        eval_tokens = job.train.per_device_eval_batch_size * on_worker if evaluates else 0
        forward = max(size * (3 * x.hidden + x.mlp_inner + x.mlp_width) for x in layers)
        loss = _loss(model, size, compiled)
        moved = num_offloaded(job, len(layers))
        returning = max(kept[:moved], default=0.0)
        return Passes(
            kept=(sum(kept[moved:]) + final) * unit,
            kept_by_one=max(kept) * unit,
            recomputed=recomputed * unit,
            temporaries=(backward + returning) * unit
            + (max(unpacked, default=0) + tiles.gradients) / GIB,
            logits=loss.training(batch * on_worker) / GIB,
            logits_gradient=loss.gradient(batch * on_worker) / GIB,
            logits_eval=loss.evaluation(eval_tokens) / GIB,
            layer_eval=forward * eval_tokens / GIB,
            on_host=sum(kept[:moved]) * unit,
        )


@dataclass(frozen=True)
class _Tiles:
    """MLPs that compute on tiles of a pass."""

    mlps: frozenset[str]
    share: float  # of the pass's tokens in a tile
    gradients: float  # bytes of one's weight gradients: a tile's, and their sum in float32

    @staticmethod
    def of(model: PreTrainedModel, job: JobConfig, tokens: int) -> _Tiles:
        tiled = job.transform(TiledMlp)
        if not tiled.enabled or tokens <= tiled.tokens:
            return _Tiles(frozenset(), 1.0, 0.0)
        found = {fqn: model.get_submodule(fqn) for fqn, why in mlps(model) if not why}
        size = compute_dtype(job).itemsize + 4
        trained = [
            sum(size * p.numel() for p in m.parameters() if p.requires_grad) for m in found.values()
        ]
        return _Tiles(frozenset(found), tiled.tokens / tokens, max(trained, default=0))

    def of_layer(self, fqn: str, layer: Layer) -> Layer:
        """Return what a layer's activations are."""
        for mlp in self.mlps:
            if mlp.startswith(f"{fqn}."):
                layer = layer.on_tiles(mlp.removeprefix(f"{fqn}."), self.share)
        return layer


def _loss(model: PreTrainedModel, size: int, compiled: bool) -> Loss | LossInHead:
    config, head, in_head = text_config(model), _head(model), head_loss(model)
    if in_head is None or head is None:
        capped = getattr(config, "final_logit_softcapping", None) is not None
        return Loss(config.vocab_size, size, compiled, capped)
    trained = sum(p.numel() for p in head.parameters() if p.requires_grad)
    return LossInHead(in_head, config.hidden_size, size, trained, isinstance(head, Float8Head))


@dataclass(frozen=True)
class Loss:
    """Bytes of the loss over full logits; see ops/loss/function.py."""

    vocab: int
    size: int
    compiled: bool
    capped: bool  # whether the model caps its logits by tanh, which keeps a copy

    def training(self, tokens: int) -> float:
        """Return the most bytes of logits, their gradient and float32 copies."""
        row = self.vocab * (self.size * (2 if self.capped else 1))
        if self.compiled:
            return tokens * (row + self.vocab * self.size)
        chunk = min(tokens, CHUNK_TOKENS) * self.vocab
        # Of a chunk, float32: log-softmax, its gradient, the gradient of the logits' copy.
        copies = 3 * 4 * chunk
        if tokens <= CHUNK_TOKENS:
            return max(tokens * row + 2 * 4 * chunk, copies)
        gradients = tokens * self.vocab * self.size
        # At the last chunk; then the chunks' gradients are joined, and briefly exist twice.
        return tokens * row + gradients + max(copies - chunk * self.size, gradients)

    def gradient(self, tokens: int) -> float:
        """Return the bytes of the gradient into the head's backward pass."""
        return tokens * self.vocab * self.size

    def evaluation(self, tokens: int) -> float:
        """Return the most bytes in a pass without gradients."""
        copies = 0 if self.compiled else 8 * min(tokens, CHUNK_TOKENS) * self.vocab
        return tokens * self.vocab * self.size + copies


@dataclass(frozen=True)
class LossInHead:
    """Bytes of a loss that the head computes without full logits; see ops/loss/head.py."""

    loss: HeadLoss
    hidden: int
    size: int
    trained: int  # trained elements of the head
    in_float8: bool = False

    def training(self, tokens: int) -> float:
        """Return the most bytes of a chunk and its gradients, in the forward pass."""
        factors = workspace(tokens, self.loss.vocab, self.hidden) if self.in_float8 else 0
        gradients = self.gradient(tokens) + self.of_parameters(tokens)
        return self.evaluation(tokens) + gradients + factors

    def evaluation(self, tokens: int) -> float:
        """Return the bytes of a chunk's logits, the most in a pass without gradients."""
        if self.loss.kernel == "cut_cross_entropy":
            return 0.0  # they stay in on-chip memory
        largest = chunk_tokens(tokens, self.loss.vocab, self.size)
        if self.loss.kernel == "liger":
            # Source: liger_kernel.ops.fused_linear_cross_entropy, inc_factor and chunk_size.
            largest = 1 << (-(-tokens * self.hidden // self.loss.vocab) - 1).bit_length()
        return min(tokens, largest) * self.loss.vocab * self.size

    def of_parameters(self, tokens: int) -> float:
        """Return the bytes of the parameters' gradient while it is accumulated."""
        if self.loss.kernel == "cut_cross_entropy":
            return 0.0  # computed in backward
        if self.loss.kernel == "liger":
            return self.trained * (4 + self.size)  # in float32, then cast
        num_chunks = -(-tokens // chunk_tokens(tokens, self.loss.vocab, self.size))
        summed = 4 + self.size if num_chunks > MOST_ROUNDINGS and self.size < 4 else self.size
        return self.trained * (summed if self.loss.reads_weight else summed + self.size)

    def gradient(self, tokens: int) -> float:
        """Return the bytes of the gradient of the head's input."""
        return tokens * self.hidden * self.size


def _head(model: PreTrainedModel) -> nn.Module | None:
    # transformers leaves this method without types.
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head


def head_loss(model: PreTrainedModel) -> HeadLoss | None:
    """Return how the model's head computes the loss, if it does."""
    head = loss_head(model)
    return None if head is None else loss_of(head)


def shard_size(job: JobConfig, world_size: int) -> int:
    """Return the ranks that share a copy of the model."""
    return min(job.parallel.fsdp_shard_size or world_size, world_size)


def num_rows(parameter: nn.Parameter) -> tuple[int, int]:
    """Return the rows that FSDP2 splits a parameter along, and the elements of a row."""
    rows = parameter.shape[0] if parameter.ndim else 1
    return rows, parameter.numel() // max(rows, 1)


def attention_kind(config: PretrainedConfig, job: JobConfig) -> AttentionKind:
    """Return the kind of attention; PyTorch's needs a mask for neat_packing."""
    if config._attn_implementation == "eager":
        return "eager"
    masked = job.data.neat_packing and config._attn_implementation == "sdpa"
    return "masked" if masked else "fused"


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
