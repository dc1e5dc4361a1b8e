"""LoRA on the 8B shape: base in bf16, with FP8 products, and held in FP8 too; one GPU, compiled.

    python jobs/benchmarks/lora_fp8_base.py [--out jobs/benchmarks/results/lora_fp8_base.json]
    ... --layers 8        a part of the 32 layers
    ... --tokens 8192     of a step
    ... --only bf16 "fp8 base"

Adapters train as they do under Ray on one GPU: in float32, computing in bf16.
"""

import argparse
import json
import sys

import torch.distributed as dist
from whole_steps import DEVICE, compare

LORA = {"finetuning_type": "lora", "lora_rank": 16}
BASE = {"quantization_bit": 8, "quantization_type": "fp8"}
VARIANTS = {
    "bf16": LORA,
    "fp8 linears": {**LORA, "fp8": True, "fp8_allow_cpu": True, "fp8_min_features": 0},
    "fp8 base": {**LORA, **BASE, "quantization_allow_cpu": True},
    "fp8 base, dequantized": {**LORA, **BASE, "quantization_products": "dequantized"},
    "nf4 base": {**LORA, "quantization_bit": 4},
}


def main() -> None:
    """Measure the variants with as many layers as the command line says."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--layers", type=int)
    chosen, rest = parser.parse_known_args()
    if chosen.layers:
        rest += ["--shape", json.dumps({"num_hidden_layers": chosen.layers})]
    sys.argv = [sys.argv[0], *rest]
    backend = "cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    compare(__doc__ or "", VARIANTS, {})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
