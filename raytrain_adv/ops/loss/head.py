"""The loss inside a model's head: FSDP2 has its weight whole there, and logits stay in chunks."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raytrain_adv.ops.loss import IGNORE
from raytrain_adv.ops.loss.linear_cross_entropy import (
    LogitMap,
    called_cross_entropy,
    linear_cross_entropy,
)

FLOATS = (torch.float32, torch.bfloat16)
Kernel = Literal["chunked", "cut_cross_entropy", "liger"]


@dataclass(frozen=True)
class HeadLoss:
    """How a head computes its loss."""

    kernel: Kernel
    logit_map: LogitMap
    reads_weight: bool
    """Whether the weight is multiplied with directly; otherwise the module is called."""
    vocab: int  # logits of a token


def install(model: nn.Module, head: nn.Module, loss: HeadLoss) -> None:
    """Make the head return the summed loss if it is given labels, and the model pass them on.

    Without labels both do what they did. Deep copies of the model are copies of this too. `model`
    is a causal language model of transformers, changed in place; `head` what makes logits of its
    body's output.
    """
    head.loss = loss  # type: ignore[assignment] # a plain attribute
    fqn = next(fqn for fqn, module in model.named_modules() if module is head)
    model.loss_head = fqn
    for module, forward in ((head, _head_forward), (model, _model_forward)):
        # Another's replacement of this instance's forward stays in use.
        module.plain_forward = module.__dict__.get("forward")  # type: ignore[assignment]
        module.forward = MethodType(forward, module)


def remove(model: nn.Module, head: nn.Module) -> None:
    """Undo install."""
    for module in (head, model):
        del module.forward
        if module.plain_forward is not None:
            module.forward = module.plain_forward  # type: ignore[assignment]
        del module.plain_forward
    del head.loss, model.loss_head


def loss_head(model: nn.Module) -> nn.Module | None:
    """Return the module that computes the loss, if one does."""
    fqn: str | None = model.__dict__.get("loss_head")
    return None if fqn is None else model.get_submodule(fqn)


def body_of(model: nn.Module) -> nn.Module | None:
    """Return the module that makes hidden states, if a model of transformers has one."""
    body: Any = getattr(model, "base_model", model)  # transformers' own name
    if body is not model:
        return body  # type: ignore[no-any-return] # transformers has no types here
    # Llama 4's text model names a body that only its multimodal one has.
    inner: list[Any] = [m for m in model.children() if hasattr(m, "base_model_prefix")]
    if len(inner) != 1:
        return None
    # That of the multimodal one has the head inside.
    one = inner[0]
    return body_of(one) if one.get_output_embeddings() is not None else one


def loss_of(module: nn.Module) -> HeadLoss | None:
    """Return how a module computes the loss, if it is a head that does."""
    loss = module.__dict__.get("loss")
    forward = getattr(module.__dict__.get("forward"), "__func__", None)
    return loss if isinstance(loss, HeadLoss) and forward is _head_forward else None


def takes_labels(model: nn.Module) -> bool:
    """Whether the model returns a loss when it is called with labels_of_tokens."""
    return getattr(model.__dict__.get("forward"), "__func__", None) is _model_forward


def loss_in_head(model: nn.Module, inputs: Mapping[str, Tensor | int], labels: Tensor) -> Tensor:
    """Return the summed loss in float32; labels [sequences, time], next tokens or -100."""
    loss: Tensor = model(**inputs, use_cache=False, labels_of_tokens=labels)
    return loss


def _model_forward(
    self: Any, *args: Any, labels_of_tokens: Tensor | None = None, **inputs: Any
) -> Any:
    if labels_of_tokens is None:
        return _plain(self, *args, **inputs)
    body, head = body_of(self), loss_head(self)
    if body is None or head is None:
        raise TypeError("labels_of_tokens without a head that computes the loss")
    return head(body(*args, **inputs)[0], labels=labels_of_tokens)


def _head_forward(self: Any, hidden: Tensor, labels: Tensor | None = None) -> Any:
    if labels is None:
        return _plain(self, hidden)
    loss: HeadLoss = self.loss
    rows, flat = hidden.flatten(0, -2), labels.flatten()
    weight = getattr(self, "weight", None)  # Mamba's hidden states are float32 in a bfloat16 model
    if isinstance(weight, torch.Tensor) and rows.dtype != weight.dtype in FLOATS:
        rows = rows.to(weight.dtype)
    if not loss.reads_weight:
        parameters = list(self.parameters())
        return called_cross_entropy(
            rows, flat, _Plain(self), parameters, loss.vocab, loss.logit_map
        )
    if own := getattr(type(self), "cross_entropy", None):
        result: Tensor = own(self, rows, flat, loss.logit_map)
        return result
    return BACKENDS[loss.kernel](rows, self.weight, self.bias, flat, loss.logit_map)


def _plain(module: Any, *args: Any, **inputs: Any) -> Any:
    """Call the forward that install found."""
    if module.plain_forward is not None:
        return module.plain_forward(*args, **inputs)
    return type(module).forward(module, *args, **inputs)


@dataclass(frozen=True)
class _Plain:
    """A head's forward without the loss."""

    head: nn.Module

    def __call__(self, hidden: Tensor) -> Tensor:
        logits: Tensor | tuple[Tensor] = _plain(self.head, hidden)
        return logits[0] if isinstance(logits, tuple) else logits  # XLM's head returns a tuple


def cut_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, logit_map: LogitMap
) -> Tensor:
    """Return linear_cross_entropy by Apple's Triton kernels; no bias, no gradient filter."""
    from cut_cross_entropy import linear_cross_entropy as fused

    if bias is not None:
        raise ValueError("cut_cross_entropy has no bias")
    scaled = hidden if logit_map.scale == 1.0 else hidden * logit_map.scale
    loss: Tensor = fused(
        scaled,
        weight,
        labels,
        ignore_index=IGNORE,
        softcap=logit_map.softcap,
        reduction="sum",
        filter_eps=None,
        impl="cce",
    )
    return loss.float()


@torch.compiler.disable  # type: ignore[untyped-decorator] # wrong with -100 in a graph: Liger#1338
def liger(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, logit_map: LogitMap
) -> Tensor:
    """Return linear_cross_entropy by Liger's fused function; its weight gradient is float32."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    scaled = hidden if logit_map.scale == 1.0 else hidden * logit_map.scale
    # In order: class weights, ignore_index, lse_square_scale, label_smoothing, reduction, softcap,
    # return_z_loss, accum_dtype.
    options = (None, IGNORE, 0.0, 0.0, "sum", logit_map.softcap, False, torch.float32)
    result = LigerFusedLinearCrossEntropyFunction.apply(scaled, weight, labels, bias, *options)
    loss: Tensor = result[0] if isinstance(result, tuple) else result
    return loss.float()


BACKENDS = {"chunked": linear_cross_entropy, "cut_cross_entropy": cut_cross_entropy, "liger": liger}
"""Kernel -> what computes the loss of a plain linear head."""
