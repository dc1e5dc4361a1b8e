"""Replaced layers beside torch's own and beside torch_compile: 8B shape, 8,192 tokens, one GPU.

    python jobs/benchmarks/layer_kernels.py [--out jobs/benchmarks/results/layer_kernels.json]
    ... --only compiled "compiled, llama_layers"
    ... --variants '{"eager": {}, "hub": {"use_kernels": true, "kernel_name": "..."}}'

Each variant is a set of job keys; torch_compile is off unless it says otherwise, the loss is the
same in all of them. The first one is what the others are held against.
"""

from typing import Any

from whole_steps import ROOT, compare

OURS = {"use_kernels": True, "kernel_name": str(ROOT / "jobs/kernels/llama_layers")}
VARIANTS: dict[str, dict[str, Any]] = {
    "eager": {},
    "eager, liger": {"use_liger_kernel": True},
    "eager, liger with rope": {
        "use_liger_kernel": {"rms_norm": True, "swiglu": True, "rope": True}
    },
    "eager, llama_layers": OURS,
    "compiled": {"torch_compile": True},
    "compiled, liger": {"torch_compile": True, "use_liger_kernel": True},
    "compiled, llama_layers": {"torch_compile": True, **OURS},
}


if __name__ == "__main__":
    compare(__doc__ or "", VARIANTS, {"torch_compile": False})
