"""The memory of forward and backward passes: what layers keep, and the loss."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.estimate.activations import AttentionKind, Layer, read_layer
from raytrain_adv.estimate.counted import Kept, kept_by_layers
from raytrain_adv.estimate.flops import layer_configs, text_config
from raytrain_adv.estimate.sizes import head_of
from raytrain_adv.model.build import decoder_layers
from raytrain_adv.model.offload import num_offloaded
from raytrain_adv.model.parallel import checkpointing_mode, compute_dtype
from raytrain_adv.ops.bitsandbytes.experts import PackedStack
from raytrain_adv.ops.bitsandbytes.linear import packed_linears
from raytrain_adv.ops.float8.experts import Float8Experts
from raytrain_adv.ops.float8.head_loss import Float8Head, workspace
from raytrain_adv.ops.loss.function import CHUNK_TOKENS
from raytrain_adv.ops.loss.head import HeadLoss, loss_head, loss_of
from raytrain_adv.ops.loss.linear_cross_entropy import MOST_ROUNDINGS, chunk_tokens
from raytrain_adv.text import GIB
from raytrain_adv.transforms.tiled_mlp import TiledMlp, mlps

COPIES, COPIES_COMPILED = 3, 2
"""Gradients as large as routed experts' results that exist at a time in a layer's backward pass:
results are weighted, summed, and put in another order. Counted on a CPU."""


@dataclass(frozen=True)
class Passes:
    """Memory of forward and backward for a micro-batch, in GiB."""

    kept: float  # kept for backward, over all layers
    kept_by_one: float  # one layer's part of it
    final: float  # kept by the final norm, until the last layer's backward pass
    recomputed: float  # recomputed during one layer's backward pass
    temporaries: float  # activation gradients in one layer's backward pass, and an unpacked weight
    returning: float  # what comes back from host memory meanwhile, for the layer below
    returning_first: float  # likewise, while the last layer's backward pass is computed
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
        kind = attention_kind(config, job)
        each = layer_configs(config)
        on_worker = seq_len // job.parallel.sequence_parallel_size
        tiles = _Tiles.of(model, job, batch * on_worker)
        named = decoder_layers(model)
        whole = [
            read_layer(layer, each[min(number, len(each) - 1)])
            for number, (_, layer) in enumerate(named)
        ]
        layers = [tiles.of_layer(fqn, x) for (fqn, _), x in zip(named, whole, strict=True)]
        keeps = kept_by_layers(model, compute_dtype(job), kind == "masked", seq_len)
        ways = [
            _Keeping.of(job, of_whole, x, on_tiles, size)
            for of_whole, x, on_tiles in zip(
                keeps or [x.guess(size) for x in whole], whole, layers, strict=True
            )
        ]
        kept = [x.kept for x in ways]
        # The final norm runs uncompiled: float32 copy, normalized form, the head's input.
        final: float = (4 + 2 * size) * config.hidden_size
        unit = batch * on_worker / GIB
        compiled = job.parallel.torch_compile
        backward = max(x.backward_temporaries(size, kind, seq_len, compiled) for x in layers)
        if kind != "eager" and keeps and not tiles.mlps:
            copies = COPIES_COMPILED if compiled else COPIES
            backward = max(backward, copies * max(x.largest for x in keeps))
        # Packed ones are unpacked one at a time, stacks where a layer's other gradients are few.
        packed = [(m.temporary_bytes / (batch * on_worker), m) for _, m in packed_linears(model)]
        stacks = [unpacked for unpacked, m in packed if isinstance(m, PackedStack)]
        linears = [unpacked for unpacked, m in packed if not isinstance(m, PackedStack)]
        backward = max(backward + max(linears, default=0.0), *stacks, 0.0)
        cast = (m.temporary_bytes for m in model.modules() if isinstance(m, Float8Experts))
        backward += max(cast, default=0) / (batch * on_worker)
        evaluates = bool(job.data.val_size or job.data.eval_dataset)
        eval_tokens = job.train.per_device_eval_batch_size * on_worker if evaluates else 0
        forward = max(size * (3 * x.hidden + x.mlp_inner + x.mlp_width) for x in layers)
        loss = _loss(model, size, compiled)
        moved = num_offloaded(job, len(layers))
        returning = max(kept[:moved], default=0.0) * unit
        return Passes(
            kept=(sum(kept[moved:]) + sum(x.stays for x in ways)) * unit,
            kept_by_one=max(kept) * unit,
            final=final * unit,
            recomputed=max(x.recomputed for x in ways) * unit,
            temporaries=backward * unit + tiles.gradients / GIB,
            returning=returning,
            returning_first=returning if moved >= len(layers) - 1 else 0.0,
            logits=loss.training(batch * on_worker) / GIB,
            logits_gradient=loss.gradient(batch * on_worker) / GIB,
            logits_eval=loss.evaluation(eval_tokens) / GIB,
            layer_eval=forward * eval_tokens / GIB,
            on_host=sum(kept[:moved]) * unit,
        )


@dataclass(frozen=True)
class _Keeping:
    """Bytes per token that a layer keeps with the job's checkpointing."""

    kept: float  # from forward to backward
    recomputed: float  # besides, in its own backward pass
    stays: float = 0.0  # kept too, and never moved to host memory

    @staticmethod
    def of(job: JobConfig, whole: Kept, layer: Layer, on_tiles: Layer, size: int) -> _Keeping:
        """Return it of a layer that keeps `whole` without checkpointing and without tiles."""
        compiled, mode = job.parallel.torch_compile, checkpointing_mode(job)
        every = whole.compiled if compiled else whole.eager
        every -= size * (layer.between(compiled) - on_tiles.between(compiled))
        if mode == "none":
            return _Keeping(every, 0.0)
        x = size * layer.hidden
        if mode == "selective":
            kept = x + (whole.needed_products if compiled else whole.products)
            kept -= size * (layer.mlp_inner - on_tiles.mlp_inner)
            return _Keeping(kept, max(every - kept, 0.0))
        results, sums = (whole.attention, whole.sums) if mode == "attention" else (0.0, 0.0)
        # Of its input a compiled layer makes nothing again, an eager one a float32 copy.
        return _Keeping(x + results, every - results - (x if compiled else 0.0), sums)


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
    config, head, in_head = text_config(model), head_of(model), head_loss(model)
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


def head_loss(model: PreTrainedModel) -> HeadLoss | None:
    """Return how the model's head computes the loss, if it does."""
    head = loss_head(model)
    return None if head is None else loss_of(head)


def attention_kind(config: PretrainedConfig, job: JobConfig) -> AttentionKind:
    """Return the kind of attention; PyTorch's needs a mask for neat_packing."""
    if config._attn_implementation == "eager":
        return "eager"
    masked = job.data.neat_packing and config._attn_implementation == "sdpa"
    return "masked" if masked else "fused"
