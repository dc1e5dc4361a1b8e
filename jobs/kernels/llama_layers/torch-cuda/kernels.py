"""The Triton kernels. All compute in float32 and round once, when they store."""

import triton
import triton.language as tl


@triton.jit
def swiglu_forward(gate, up, out, numel, BLOCK: tl.constexpr):
    """out = silu(gate) * up."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numel
    a = tl.load(gate + index, mask=inside).to(tl.float32)
    b = tl.load(up + index, mask=inside).to(tl.float32)
    tl.store(out + index, (a * tl.sigmoid(a) * b).to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(gradient, gate, up, of_gate, of_up, numel, BLOCK: tl.constexpr):
    """Both gradients, silu(gate) computed again."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numel
    g = tl.load(gradient + index, mask=inside).to(tl.float32)
    a = tl.load(gate + index, mask=inside).to(tl.float32)
    b = tl.load(up + index, mask=inside).to(tl.float32)
    share = tl.sigmoid(a)
    slope = share * (1 + a * (1 - share))
    tl.store(of_gate + index, (g * b * slope).to(of_gate.dtype.element_ty), mask=inside)
    tl.store(of_up + index, (g * a * share).to(of_up.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_forward(x, weight, out, inverse, features, epsilon, BLOCK: tl.constexpr):
    """One program for each row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < features
    values = tl.load(x + row * features + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    rms = tl.sqrt(tl.sum(values * values, axis=0) / features + epsilon)
    tl.store(inverse + row, 1 / rms)
    result = values / rms * scale
    tl.store(out + row * features + column, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_backward(
    gradient, x, weight, inverse, of_x, of_weight, rows, features, BLOCK: tl.constexpr
):
    """Each program takes every n-th row, and sums its part of the weight's gradient."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < features
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        place = row * features + column
        g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
        share = tl.load(inverse + row)
        normal = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * share
        total += g * normal
        g = g * scale
        mean = tl.sum(g * normal, axis=0) / features
        result = (g - normal * mean) * share
        tl.store(of_x + place, result.to(of_x.dtype.element_ty), mask=inside)
    tl.store(of_weight + program * features + column, total, mask=inside)
