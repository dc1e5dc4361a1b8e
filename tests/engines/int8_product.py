"""Compare an int8 product of vLLM's CPU build with the exact sum of the same integers.

    ONEDNN_MAX_CPU_ISA=AVX2 build/engines/vllm/bin/python tests/engines/int8_product.py _C_AVX2

Run it by the Python that has vLLM. oneDNN, which multiplies, takes the named instructions at most:
AVX2 and AVX512_CORE have no VNNI, AVX2_VNNI and AVX512_CORE_VNNI have.
"""

import importlib.util
import sys
from pathlib import Path

import torch

TOKENS, FEATURES, ROWS = 32, 576, 1536


def main(library: str) -> float:
    """Print and return the mean error, as a share of the exact product's mean magnitude."""
    found = importlib.util.find_spec("vllm")
    assert found is not None and found.origin is not None, "vLLM is not installed here"
    torch.ops.load_library(str(Path(found.origin).parent / f"{library}.abi3.so"))
    operators = torch.ops._C
    torch.manual_seed(0)
    x = (torch.randn(TOKENS, FEATURES) * 1.3 + 0.2).to(torch.bfloat16)
    weight = torch.randint(-128, 128, (ROWS, FEATURES), dtype=torch.int8)
    of_weight = torch.rand(ROWS, 1) * 0.01 + 0.001
    integers, scale = torch.empty_like(x, dtype=torch.int8), torch.empty(TOKENS, 1)
    zero = torch.empty(TOKENS, 1, dtype=torch.int32)
    operators.dynamic_scaled_int8_quant(integers, x, scale, zero)
    adjusted = weight.t().sum(0, keepdim=True, dtype=torch.float32) * of_weight.squeeze()
    shape = (weight.t(), of_weight, torch.bfloat16, True, True, 32)
    handler = torch.tensor(operators.create_onednn_scaled_mm_handler(*shape), dtype=torch.int64)
    product = torch.empty(TOKENS, ROWS, dtype=torch.bfloat16)
    operators.onednn_scaled_mm(product, integers, scale, zero, adjusted, None, handler)
    exact = (integers.double() - zero.double()) @ weight.double().t()
    exact = exact * scale.double() * of_weight.double().t()
    error = float((product.double() - exact).abs().mean() / exact.abs().mean())
    print(f"{library}: error {error:.2%}")
    return error


if __name__ == "__main__":
    main(sys.argv[1])
