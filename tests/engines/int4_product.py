"""Time the product that vLLM's CPU build computes with W4A16 weights without AMX, and bf16's.

    OMP_NUM_THREADS=1 build/engines/vllm/bin/python tests/engines/int4_product.py _C

Run it by the Python that has vLLM. Times are processor seconds, the least of 60.
"""

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

GROUP = 32


def main(library: str) -> None:
    """Print microseconds of both, at two shapes and three numbers of tokens."""
    found = importlib.util.find_spec("vllm")
    assert found is not None and found.origin is not None, "vLLM is not installed here"
    torch.ops.load_library(str(Path(found.origin).parent / f"{library}.abi3.so"))
    torch.manual_seed(0)
    for outputs, inputs in ((1536, 576), (4096, 4096)):
        integers = torch.randint(0, 16, (inputs, outputs), dtype=torch.int32)
        scale = (torch.rand(inputs // GROUP, outputs) / 100).to(torch.bfloat16)
        packed = pack(integers)
        plain = (integers - 8).float() * scale.float().repeat_interleave(GROUP, 0)
        weight = plain.to(torch.bfloat16).t().contiguous()
        plain = weight.t().float()
        for tokens in (1, 8, 64):
            x = torch.randn(tokens, inputs).to(torch.bfloat16)
            out = torch.empty(tokens, outputs, dtype=torch.bfloat16)
            given = (x, packed, out, scale, None, None, 8, "vec")
            int4 = least(lambda given=given: torch.ops._C.cpu_gemm_wna16(*given))
            bf16 = least(lambda x=x, w=weight: torch.nn.functional.linear(x, w))
            error = (out.float() - x.float() @ plain).norm() / (x.float() @ plain).norm()
            print(
                f"{inputs} x {outputs}, {tokens} tokens: W4A16 {int4:.0f} us, bf16 {bf16:.0f} us, "
                f"{int4 / bf16:.2f} of it; error {error:.2%}"
            )


def pack(integers: torch.Tensor) -> torch.Tensor:
    """Return integers [inputs, outputs] as vLLM packs them: eight outputs to a word, in blocks of
    16 outputs.
    """
    shifts = 4 * torch.arange(8, dtype=torch.int32)
    words = (integers.unflatten(1, (-1, 8)) << shifts).sum(-1, dtype=torch.int32)
    return words.view(len(integers), -1, 2).permute(1, 0, 2).flatten(1).contiguous()


def least(run: Callable[[], object]) -> float:
    """Return the least processor time of a call, in microseconds."""
    times = []
    for _ in range(60):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1e6 * min(times)


if __name__ == "__main__":
    main(sys.argv[1])
