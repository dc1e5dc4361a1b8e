"""Linear and embedding layers that compute with the values a quantized model would have."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrain_adv.ops.fake_quant.engine_rounding import (
    fake_quantize_float4,
    fake_quantize_float8_blocks,
    fake_quantize_inputs_of_experts,
    fake_quantize_rows,
    fake_quantize_tokens_in_float32,
    int8_product,
)
from raytrain_adv.ops.fake_quant.rounding import (
    BITS,
    LEAST_SCALE,
    LEAST_TOKEN_SCALE,
    fake_quantize_float8,
    fake_quantize_groups,
    fake_quantize_tokens,
    quantize_float8,
    through,
    through_groups,
)
from raytrain_adv.ops.fake_quant.targets import (
    BLOCK,
    FLOAT8,
    FLOAT8_BLOCKS,
    FLOAT8_GROUPS,
    FLOAT8_IN_FLOAT32,
    FLOAT8_ROWS,
    FOUR_BIT_FLOATS,
    INT8_IN_FLOAT32,
    INT8_OF_EXPERTS,
)
from raytrain_adv.ops.views import unalias

Scheme = tuple[str, int, str]
"""What weights are rounded to, features that share a scale, and what activations are rounded to:
empty leaves them.
"""
ROWS_AT_ONCE = 8192  # rows of an embedding whose gradient is passed through their rounding together


@torch._dynamo.allow_in_graph
class _Product(torch.autograd.Function):
    """x @ weight.t() + bias, both factors rounded; backward rounds again rather than keep them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scheme: Scheme) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.scheme = scheme
        return unalias(rounded_product(x, weight, bias, scheme))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        return *rounded_gradients(x, weight, ctx.scheme, gradients[0], needed), None


@torch._dynamo.allow_in_graph
class _Rows(torch.autograd.Function):
    """Rows of a table of rounded weights; only the rows that are looked up are rounded."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, weight_dtype: str, group_size: int, padding_idx: int
    ) -> Tensor:
        ctx.save_for_backward(ids, weight)
        ctx.kinds = (weight_dtype, group_size, padding_idx)
        rows = F.embedding(ids, weight)
        rounded, _ = rounded_weight(rows.view(-1, rows.shape[-1]), weight_dtype, group_size)
        return rounded.view(rows.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ids, weight = ctx.saved_tensors
        weight_dtype, group_size, padding_idx = ctx.kinds
        grad_weight: Tensor = torch.ops.aten.embedding_dense_backward(
            gradients[0].contiguous(), ids, weight.shape[0], padding_idx, False
        )
        if weight_dtype != FLOAT8:
            # Part by part: rounded whole, a table of 128,256 rows of 4,096 took 4 GiB more.
            parts = (torch.split(x, ROWS_AT_ONCE) for x in (grad_weight, weight))
            for rows, of in zip(*parts, strict=True):
                _, scale = fake_quantize_groups(of, BITS[weight_dtype], group_size, rows)
                rows.copy_(through_groups(rows, of, scale, BITS[weight_dtype]))
        return None, grad_weight, None, None, None


def rounded_product(x: Tensor, weight: Tensor, bias: Tensor | None, scheme: Scheme) -> Tensor:
    """Return x @ weight.t() + bias with both factors rounded: [..., in] -> [..., out]."""
    weight_dtype, group_size, activation_dtype = scheme
    if weight_dtype == activation_dtype == INT8_IN_FLOAT32:
        return int8_product(x, weight, bias)
    if weight_dtype in (FLOAT8, FLOAT8_ROWS) and activation_dtype in (FLOAT8, FLOAT8_IN_FLOAT32):
        return float8_product(x, weight, bias, activation_dtype == FLOAT8_IN_FLOAT32)
    rounded, _ = rounded_weight(weight, weight_dtype, group_size)
    rounded_x, _, _ = rounded_activation(x, activation_dtype)
    if weight_dtype == FLOAT8 and bias is not None:  # torchao rounds the product before it adds
        return F.linear(rounded_x, rounded) + bias
    return F.linear(rounded_x, rounded, bias)


def rounded_gradients(
    x: Tensor,
    weight: Tensor,
    scheme: Scheme,
    gradient: Tensor,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return rounded_product's gradients of x, weight and bias; None where none is needed."""
    weight_dtype, group_size, activation_dtype = scheme
    needs_x, needs_weight, needs_bias = needed
    rows = gradient.reshape(-1, gradient.shape[-1])
    grad_x = grad_weight = grad_bias = None
    rounded, weight_scale = rounded_weight(weight, weight_dtype, group_size, gradient)
    rounded_x, scale, zero_point = rounded_activation(x, activation_dtype, gradient)
    if needs_x:
        grad_x = (rows @ rounded).view(x.shape)
        if scale is not None and zero_point is not None:
            grad_x = through(grad_x, x, scale, zero_point, 8)
    if needs_weight:
        grad_weight = rows.t() @ rounded_x.reshape(-1, x.shape[-1])
        if weight_scale is not None:
            grad_weight = through_groups(grad_weight, weight, weight_scale, BITS[weight_dtype])
    if needs_bias:
        grad_bias = rows.sum(0)
    return grad_x, grad_weight, grad_bias


def rounded_weight(
    weight: Tensor, dtype: str, group_size: int, after: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return a weight rounded, and its gradient's scales; None if that passes straight through."""
    if dtype in (FLOAT8, FLOAT8_ROWS):
        return fake_quantize_float8(weight, after), None
    if dtype == FLOAT8_BLOCKS:
        return fake_quantize_float8_blocks(weight, after), None
    if dtype == INT8_IN_FLOAT32:
        return fake_quantize_rows(weight, after), None
    if dtype in FOUR_BIT_FLOATS:
        return fake_quantize_float4(weight, dtype, after), None
    rounded, scale = fake_quantize_groups(
        weight, BITS[dtype], group_size, after, LEAST_SCALE.get(dtype, 0.0)
    )
    return rounded, scale


def rounded_activation(
    x: Tensor, dtype: str, after: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return activations rounded, and the scales and zero points their gradient passes through."""
    if dtype == FLOAT8:
        return fake_quantize_float8(x, after), None, None
    if dtype == FLOAT8_IN_FLOAT32:
        return fake_quantize_float8(x, after, True, LEAST_TOKEN_SCALE), None, None
    if dtype == FLOAT8_GROUPS:
        groups = x.reshape(*x.shape[:-1], -1, BLOCK)
        return fake_quantize_float8(groups, after, True).flatten(-2), None, None
    if dtype == INT8_IN_FLOAT32:
        return fake_quantize_tokens_in_float32(x, after), None, None
    if dtype == INT8_OF_EXPERTS:
        return fake_quantize_inputs_of_experts(x, after), None, None
    if dtype == "":
        return x, None, None
    rounded, scale, zero_point = fake_quantize_tokens(x, after)
    return rounded, scale, zero_point


def float8_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_float32: bool = False
) -> Tensor:
    """Return x @ weight.t() + bias with both factors in float8, one scale per row of each.

    Source: torchao 0.18, _float8_addmm_impl without mslk. On a GPU x is bfloat16. `in_float32`:
    activations are rounded as in quantize_float8.
    """
    rows, least = x.reshape(-1, x.shape[-1]), LEAST_TOKEN_SCALE if in_float32 else 0.0
    values, scale = quantize_float8(rows, None, in_float32, least)
    of_weight, weight_scale = quantize_float8(weight)
    # _scaled_mm adds no bias to float32.
    added = bias if x.dtype != torch.float32 else None
    output = torch._scaled_mm(
        values,
        of_weight.t(),
        scale_a=scale,
        scale_b=weight_scale.t(),
        bias=added,
        out_dtype=x.dtype,
        use_fast_accum=True,
    ).view(*x.shape[:-1], weight.shape[0])
    return output if bias is None or added is not None else output + bias


class FakeQuantizedLinear(nn.Linear):
    """A linear that multiplies rounded activations with rounded weights.

    Forward and gradients are torchao 0.18's FakeQuantizedLinear's bit for bit for integers
    (tests/unit/ops); its float8 form scales gradients out of float8's range, which ours passes
    straight through.
    """

    scheme: Scheme
    rounds: bool  # whether it rounds now, or computes as a plain linear

    @classmethod
    def of(
        cls, linear: nn.Linear, weight_dtype: str, group_size: int | None, activation_dtype: str
    ) -> "FakeQuantizedLinear":
        """Return one that owns a linear's parameters; for the dtypes see config_of."""
        with torch.device("meta"):
            new = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        new.weight, new.bias, new.rounds = linear.weight, linear.bias, True
        new.scheme = (weight_dtype, group_size or linear.in_features, activation_dtype)
        return new

    def forward(self, input: Tensor) -> Tensor:
        """Return input @ weight.t() + bias: [..., in_features] -> [..., out_features]."""
        if not self.rounds:
            return F.linear(input, self.weight, self.bias)
        output: Tensor = _Product.apply(input, self.weight, self.bias, self.scheme)  # type: ignore[no-untyped-call]
        return output


class FakeQuantizedEmbedding(nn.Embedding):
    """An embedding whose rows are rounded as they are looked up."""

    weight_dtype: str
    group_size: int
    rounds: bool

    @classmethod
    def of(
        cls, embedding: nn.Embedding, weight_dtype: str, group_size: int | None
    ) -> "FakeQuantizedEmbedding":
        """Return one that owns an embedding's parameter; see FakeQuantizedLinear.of."""
        with torch.device("meta"):
            new = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx)
        new.weight = embedding.weight
        new.weight_dtype, new.group_size = weight_dtype, group_size or embedding.embedding_dim
        new.rounds = True
        return new

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of the ids: [...] -> [..., embedding_dim]."""
        if not self.rounds:
            return F.embedding(input, self.weight, self.padding_idx)
        padding = -1 if self.padding_idx is None else self.padding_idx
        rows: Tensor = _Rows.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.weight_dtype, self.group_size, padding
        )
        return rows


FakeQuantized = FakeQuantizedLinear | FakeQuantizedEmbedding
