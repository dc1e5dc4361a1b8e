"""Products of exported weights by the GPU kernels that PyTorch has, at the linears of an 8B model.

    python jobs/benchmarks/exported_products.py [--tokens 1 16 256 4096] [--out FILE]
        [--vllm FOLDER]

Each weight is stored as export stores it, and multiplied from these bytes: W8A8 by cuBLAS's int8
product, FP8 by torch._scaled_mm (CUTLASS), W4A16 by tinygemm. Activations are rounded within the
measured time, compiled. The error is that to the product that training computes. Calls are
recorded as a CUDA graph over copies of the weight that exceed the L2 cache. With --vllm, the folder
of an unpacked wheel of vLLM for the installed PyTorch, its kernels multiply the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import vllm_products
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from raytrain_adv.ops.fake_quant.compressed_tensors import Scheme, read_back, stored
from raytrain_adv.ops.fake_quant.engine_rounding import tokens_in_int8
from raytrain_adv.ops.fake_quant.layers import rounded_product
from raytrain_adv.ops.fake_quant.rounding import E4M3, EPS, LEAST_TOKEN_SCALE
from raytrain_adv.ops.fake_quant.targets import FLOAT8_IN_FLOAT32, FLOAT8_ROWS, INT8_IN_FLOAT32

LINEARS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
"""Output and input features of a layer, fused as engines do."""
CACHE_BYTES = 300e6  # of copies of one weight: five times the L2 cache of an H200
Product = Callable[[Tensor], Tensor]
SCHEMES = {
    "W8A8": Scheme(INT8_IN_FLOAT32, None, INT8_IN_FLOAT32),
    "FP8": Scheme(FLOAT8_ROWS, None, FLOAT8_IN_FLOAT32),
    "W4A16, groups of 32": Scheme("int4", 32, ""),
    "W4A16, groups of 128": Scheme("int4", 128, ""),
}


def main() -> None:
    """Measure each form at each number of tokens, and print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256, 4096])
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--vllm", type=Path, help="folder of an unpacked wheel of vLLM")
    options = parser.parse_args()
    engine: dict[str, Any] = {}
    if options.vllm is not None:
        vllm_products.load(options.vllm)
        engine = vllm_products.forms((32, 128))
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # one kernel for each shape
    rows: list[dict[str, Any]] = []
    for name, (outputs, inputs) in LINEARS.items():
        weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) / inputs**0.5
        for form in ("bf16", *SCHEMES, *engine):
            for tokens in options.tokens:
                found = measure(form, weight, tokens, *engine.get(form, ()))
                row = {"linear": name, "form": form, "tokens": tokens, **found}
                rows.append(row)
                print(json.dumps(row), flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps({**about(options), "rows": rows}, indent=1) + "\n")
    for line in layer(rows, options.tokens):
        print(line)


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the figures were measured on."""
    return {
        "date": str(date.today()),
        "command": "python jobs/benchmarks/exported_products.py --tokens "
        + " ".join(map(str, options.tokens)),
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__},
    }


def measure(
    form: str,
    weight: Tensor,
    tokens: int,
    exported: str = "",
    multiplied: Callable[[dict[str, Tensor]], Product] | None = None,
) -> dict[str, Any]:
    """Return time, stored bytes and error of a weight's product, or why there is none. `multiplied`
    is an engine's own product of what is exported as the form `exported`.
    """
    x = torch.randn(tokens, weight.shape[1], device="cuda", dtype=torch.bfloat16)
    scheme = SCHEMES.get(exported or form)
    size = sum(t.nbytes for t in tensors(weight, scheme).values())
    copies = max(2, round(CACHE_BYTES / size))
    try:
        if multiplied is None:
            products = [product(weight.clone(), scheme) for _ in range(copies)]
        else:
            products = [multiplied(tensors(weight, scheme)) for _ in range(copies)]
        found = products[0](x)
        microseconds = time(products, x)
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0][:300]}
    wanted = x @ weight.t()
    if scheme is not None:
        groups = scheme.group_size or weight.shape[1]
        how = (scheme.weight_form, groups, scheme.activation_form)
        wanted = rounded_product(x, weight, None, how)
    off = (found.float() - wanted.float()).norm() / wanted.float().norm()
    return {"us": round(microseconds, 2), "bytes": size, "error": float(off)}


def tensors(weight: Tensor, scheme: Scheme | None) -> dict[str, Tensor]:
    """Return what export writes for a weight."""
    return {"weight": weight} if scheme is None else stored("weight", weight, scheme)


def product(weight: Tensor, scheme: Scheme | None) -> Product:
    """Return a function that multiplies inputs [tokens, features] with a stored weight."""
    held = tensors(weight, scheme)
    if scheme is None:
        return lambda x: x @ weight.t()
    if scheme.weight_form == INT8_IN_FLOAT32:
        return int8(held["weight"], held["weight_scale"])
    if scheme.weight_form == FLOAT8_ROWS:
        return float8(held["weight"], held["weight_scale"])
    return int4(held, weight, scheme)


int8_inputs = torch.compile(tokens_in_int8, dynamic=False)


@torch.compile(dynamic=False)
def int8_outputs(
    sums: Tensor, scale: Tensor, zero_point: Tensor, of_rows: Tensor, weight_scale: Tensor
) -> Tensor:
    """Scale sums of integers, in one kernel."""
    exact = (sums - zero_point * of_rows).to(torch.float32)
    return (exact * scale * weight_scale).to(torch.bfloat16)


def int8(integers: Tensor, scale: Tensor) -> Product:
    """Return the product with int8 weights [outputs, inputs] and a scale per output."""
    of_rows, row_scale = integers.sum(1, dtype=torch.int32), scale.view(1, -1)

    def multiply(x: Tensor) -> Tensor:
        tokens = len(x)
        values, x_scale, zero_point = int8_inputs(x)
        if tokens <= 16:  # cuBLAS takes more than 16 rows
            values = torch.nn.functional.pad(values, (0, 0, 0, 32 - tokens))
        sums = torch._int_mm(values, integers.t())[:tokens]
        return int8_outputs(sums, x_scale, zero_point, of_rows, row_scale)

    return multiply


@torch.compile(dynamic=False)
def float8_inputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round inputs by the formula of quantize_float8."""
    amax, largest = x.abs().amax(dim=-1, keepdim=True), torch.finfo(E4M3).max
    scale = (amax.clamp(min=EPS).to(torch.float32) / largest).clamp(min=LEAST_TOKEN_SCALE)
    return (x.to(torch.float32) / scale).clamp(-largest, largest).to(E4M3), scale


def float8(values: Tensor, scale: Tensor) -> Product:
    """Return the product with float8 weights [outputs, inputs] and a scale per output."""
    row_scale = scale.to(torch.float32).view(1, -1)

    def multiply(x: Tensor) -> Tensor:
        rounded, x_scale = float8_inputs(x)
        how: dict[str, Any] = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        return torch._scaled_mm(rounded, values.t(), scale_a=x_scale, scale_b=row_scale, **how)

    return multiply


def int4(held: dict[str, Tensor], weight: Tensor, scheme: Scheme) -> Product:
    """Return the product with int4 weights: the packed integers in tinygemm's order, which is not
    that of vLLM's Marlin.
    """
    size = scheme.group_size or weight.shape[1]
    scale = held["weight_scale"]
    values = read_back("weight", held, scheme, torch.bfloat16).to(torch.float32)
    groups = values.view(*scale.shape, size) / scale.to(torch.float32).unsqueeze(-1)
    integers = torch.round(groups).flatten(1).to(torch.int32) + 8
    pairs = (integers[:, ::2] << 4 | integers[:, 1::2]).to(torch.uint8)
    packed = torch._convert_weight_to_int4pack(pairs, 8)
    both = torch.stack((scale, torch.zeros_like(scale)), -1).transpose(0, 1).contiguous()
    return lambda x: torch._weight_int4pack_mm(x, packed, size, both)


def time(products: list[Product], x: Tensor, repeats: int = 20) -> float:
    """Return microseconds of one product, of calls to each in turn that are recorded as a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for one in products[:3]:
            one(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in products:
            one(x)
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(products))
    return sorted(times)[repeats // 2]


def layer(rows: list[dict[str, Any]], tokens: list[int]) -> list[str]:
    """Return a line for each form and number of tokens: the four linears together."""
    lines = []
    for form in dict.fromkeys(row["form"] for row in rows):
        for count in tokens:
            of = [row for row in rows if (row["form"], row["tokens"]) == (form, count)]
            plain = [row for row in rows if (row["form"], row["tokens"]) == ("bf16", count)]
            if any("us" not in row for row in of):
                lines.append(f"{form:40} {count:6} tokens: no kernel for all linears")
                continue
            us, base = (sum(row["us"] for row in each) for each in (of, plain))
            mib = sum(row["bytes"] for row in of) / 2**20
            off = max(row["error"] for row in of)
            lines.append(
                f"{form:40} {count:6} tokens: {us:9.1f} us, {base / us:5.2f} x bf16's speed, "
                f"{mib:6.0f} MiB, error {off:.1e}"
            )
    return lines


if __name__ == "__main__":
    main()
