"""The values of rounded weights by the definition of each format, in float32 on the CPU.

Each function takes tensors as they are in the file, or the same rows of all of them.
"""

import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of a 4-bit float with two exponent bits; the sign is the fourth bit."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of each 4-bit group of an int32, from the lowest bits. Source: AutoAWQ's packing_utils."""


def exponents(scale: torch.Tensor) -> torch.Tensor:
    """Return scales in float32; bytes are exponents of two (E8M0), as OCP MX defines them."""
    if scale.dtype == torch.uint8:
        return torch.exp2(scale.float() - 127)
    return scale.float()


def floats4(packed: torch.Tensor) -> torch.Tensor:
    """Return the 4-bit floats of bytes [..., n], the lower half of a byte first: [..., 2 n]."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=packed.device)
    return table[halves(packed, low_first=True)]


def halves(packed: torch.Tensor, low_first: bool) -> torch.Tensor:
    """Return the 4-bit integers of bytes [..., n] as indices [..., 2 n]."""
    values = packed.view(torch.uint8)
    pair = [values & 15, values >> 4]
    return torch.stack(pair if low_first else pair[::-1], dim=-1).flatten(-2).long()


def integers(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the unsigned integers in int32 [..., n], the lowest bits first: [..., n * per int]."""
    shifts = torch.arange(0, 32 // bits * bits, bits, dtype=torch.int32, device=packed.device)
    values: torch.Tensor = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return values.flatten(-2)


def spread(scale: torch.Tensor, rows: int, columns: int, block: tuple[int, int]) -> torch.Tensor:
    """Return block scales [..., row blocks, column blocks] for weights [..., rows, columns].

    A single row or column of them is for all.
    """
    scale = scale[:, None] if scale.ndim == 1 else scale
    for axis, (count, size) in enumerate(zip((rows, columns), block, strict=True), start=-2):
        if scale.ndim and scale.shape[axis] != 1:
            scale = scale.repeat_interleave(size, axis).narrow(axis, 0, count)
    return scale


def scaled(
    weight: torch.Tensor,
    scale: torch.Tensor,
    block: tuple[int, int],
    zero: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return (weight - zero) * scale; `block` is the rows and columns that share a scale.

    Source: DeepSeek-V3's weight_dequant; dequantize of compressed-tensors.
    """
    rows, columns = weight.shape[-2:]
    values = weight.float()
    if zero is not None:
        values = values - spread(zero.float(), rows, columns, block)
    return values * spread(exponents(scale), rows, columns, block)


def mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return gpt-oss's experts [experts, in, out] of blocks [experts, out, in / 32, 16].

    Source: OpenAI's gpt-oss, torch/weights.py; transformers then stores them transposed.
    """
    values = floats4(blocks) * exponents(scales).unsqueeze(-1)
    return values.flatten(-2).transpose(1, 2).contiguous()


def mxfp4_rows(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return weights [rows, 2 n] of bytes [rows, n], with an exponent per 32."""
    return scaled(floats4(packed), scale, (1, 32))


def nvfp4(packed: torch.Tensor, scale: torch.Tensor, overall: torch.Tensor) -> torch.Tensor:
    """Return weights of 4-bit floats with a float8 scale per 16, divided by one overall scale.

    Source: dequantize of compressed-tensors, whose global scale is a divisor.
    """
    values = floats4(packed)
    per_scale = values.shape[-1] // scale.shape[-1]
    return values * (scale.float() / overall.float()).repeat_interleave(per_scale, -1)


def packed_integers(
    packed: torch.Tensor,
    scale: torch.Tensor,
    columns: int,
    zero: torch.Tensor | None = None,
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return compressed-tensors' int32-packed weights [rows, columns].

    `groups` is each column's group if columns were sorted; else groups lie side by side. Zeros are
    packed along rows. Source: unpack_from_int32 of compressed-tensors, which packs q + 2^(bits-1).
    """
    rows = packed.shape[0]
    bits = 32 // -(-columns // packed.shape[1])
    offset = 2 ** (bits - 1)
    values: torch.Tensor = (integers(packed, bits)[:, :columns] - offset).float()
    if groups is None or bool((groups < 0).any()):
        groups = torch.arange(columns, device=scale.device) // -(-columns // scale.shape[1])
    if zero is not None:
        if zero.dtype == torch.int32:
            zero = integers(zero.t(), bits).t()[:rows] - offset
        values -= zero.float()[:, groups.long()]
    factors: torch.Tensor = scale.float()[:, groups.long()]
    return values * factors


def gptq(
    packed: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    bits: int,
    zero_offset: int,
) -> torch.Tensor:
    """Return GPTQ's weights [out, in] of int32 [in * bits / 32, out].

    The first version of the format stores a zero less one. Source: GPTQModel's TorchQuantLinear.
    """
    values = integers(packed.t(), bits)
    zero = (integers(zeros, bits) + zero_offset).t()
    groups = groups.long()
    weights: torch.Tensor = (values - zero[:, groups]).float() * scales.t().float()[:, groups]
    return weights


def awq(packed: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return AWQ's weights [out, in] of int32 [in, out / 8]. Source: AutoAWQ's dequantize_gemm."""
    order = torch.tensor(AWQ_ORDER).argsort()

    def unpacked(held: torch.Tensor) -> torch.Tensor:
        values = integers(held, 4)
        return values.reshape(len(values), -1, 8)[..., order].flatten(-2)

    size = packed.shape[0] // scales.shape[0]
    zero, scale = (t.repeat_interleave(size, 0) for t in (unpacked(zeros), scales.float()))
    return ((unpacked(packed) - zero).float() * scale).t().contiguous()


def aqlm(codes: torch.Tensor, books: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return AQLM's weights [out, in]: sums of a vector of each codebook, times a scale per group.

    `codes` are [groups of rows, groups of columns, codebooks], `books` are [codebooks, vectors,
    rows, columns]. Source: _dequantize_weight of the aqlm package.
    """
    count, size = books.shape[:2]
    chosen = codes.long() % size  # signed integers of 8 or 16 bits
    values = sum(books[i].float()[chosen[..., i]] for i in range(count))
    weights: torch.Tensor = (values * scales.float()).transpose(-3, -2)
    return weights.reshape(weights.shape[0] * weights.shape[1], -1)


def bits4(
    packed: torch.Tensor,
    table: torch.Tensor,
    scale: torch.Tensor,
    block: int,
    outer: torch.Tensor | None = None,
    outer_table: torch.Tensor | None = None,
    inner: int = 0,
    offset: float = 0.0,
) -> torch.Tensor:
    """Return bitsandbytes' 4-bit weights, flat, with a scale per `block`; upper halves first.

    With `outer` the scales are rounded themselves: indices in a table, times one number per
    `inner` of them, plus `offset`.
    """
    values = table.float()[halves(packed.flatten(), low_first=False)]
    if outer is not None and outer_table is not None:
        spread_out = outer.repeat_interleave(inner)[: len(scale)]
        scale = outer_table.float()[scale.long()] * spread_out + offset
    return values * scale.repeat_interleave(block)[: len(values)]


def rows8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return bitsandbytes' int8 weights: a scale per row is the row's largest value."""
    return weight.float() * (scale.float()[:, None] / 127.0)
