"""Replaced layers beside torch's own and beside torch_compile: 8B shape, 8,192 tokens, one GPU.

    python jobs/benchmarks/layer_kernels.py [--out jobs/benchmarks/results/layer_kernels.json]
    ... --only "compiled;compiled, llama_layers"
    ... --variants '{"eager": {}, "hub": {"use_kernels": true, "kernel_name": "..."}}'

Each variant is a set of job keys; torch_compile is off unless it says otherwise, the loss is the
same in all of them. The first one is what the others are held against.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from whole_steps import ROOT, Whole, free, head_of_results, job_of, measured

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


def main() -> None:
    """Measure each variant, print a table, write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", default="", help="name -> job keys, as JSON")
    parser.add_argument("--only", default="", help="names of variants, with ; between them")
    parser.add_argument("--loss-kernel", default="chunked")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=6, help="measured, after three")
    parser.add_argument("--shape", default="{}", help="config keys to change, as JSON, for a trial")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    chosen = parser.parse_args()
    variants = json.loads(chosen.variants) if chosen.variants else VARIANTS
    if chosen.only:
        variants = {name: variants[name] for name in chosen.only.split(";")}
    figures: dict[str, dict[str, Any]] = {}
    for name, keys in variants.items():
        base = {"torch_compile": False, "loss_kernel": chosen.loss_kernel}
        model = Whole.of(job_of(json.loads(chosen.shape), **{**base, **keys}))
        result = measured(model.stepper(chosen.tokens), chosen.steps, warm_up=3)
        figures[name] = {**result, "tokens_per_second": chosen.tokens / result["seconds"]}
        print(name, json.dumps(figures[name]), file=sys.stderr, flush=True)
        del model
        free()
    if chosen.out is not None:
        results = head_of_results(" ".join(["python", *sys.argv]))
        results |= {"tokens": chosen.tokens, "variants": variants, "figures": figures}
        chosen.out.write_text(json.dumps(results, indent=1) + "\n")
    base_s = next(iter(figures.values()))["seconds"]
    for name, result in figures.items():
        speed = f"{1e3 * result['seconds']:8.1f} ms  {base_s / result['seconds']:6.3f} x"
        print(f"{name:<28} {speed}  {result['peak_gib']:6.2f} GiB")


if __name__ == "__main__":
    main()
