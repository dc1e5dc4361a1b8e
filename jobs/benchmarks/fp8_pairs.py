"""FP8 beside QAT and LoRA, and each without it: 8B shape, 8,192 tokens, one GPU, compiled layers.

    python jobs/benchmarks/fp8_pairs.py [--out jobs/benchmarks/results/fp8_pairs.json]
    ... --only bf16 "qat int4" "fp8, qat int4"        some of them

Adapters train as they do under Ray: FSDP2 over the one GPU keeps them in float32 and computes in
bf16.
"""

from typing import Any

import torch.distributed as dist
from whole_steps import DEVICE, compare

FP8 = {"fp8": True, "fp8_allow_cpu": True}
QAT = {
    "enable_qat": True,
    "qat_activation_dtype": "int8",
    "qat_group_size": 32,
    "qat_quantize_embedding": False,
}
INT4 = {**QAT, "qat_weight_dtype": "int4"}
INT8 = {**QAT, "qat_weight_dtype": "int8"}
PER_CHANNEL = {**INT4, "qat_group_size": None}
LORA = {"finetuning_type": "lora", "lora_rank": 16}
GATHERED = {"fp8_enable_fsdp_float8_all_gather": True}
FULL = {"disable_gradient_checkpointing": False, "gradient_checkpointing": "full"}
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": FP8,
    "fp8 rowwise": {**FP8, "fp8_recipe": "rowwise"},
    "fp8 head": {**FP8, "fp8_lm_head": True},
    "qat int4": INT4,
    "qat int8": INT8,
    "qat w8a8": {"enable_qat": True, "qat_target": "vllm-w8a8-int8"},
    "qat fp8": {"enable_qat": True, "qat_target": "vllm-fp8"},
    "fp8, qat int4": {**FP8, **INT4},
    "fp8, qat int4 per channel": {**FP8, **PER_CHANNEL},
    "fp8, qat int8": {**FP8, **INT8},
    "lora": LORA,
    "fp8, lora": {**FP8, **LORA},
    "fp8 gathered, lora": {**FP8, **GATHERED, **LORA},
    "lora, checkpointing": {**LORA, **FULL},
    "fp8, lora, checkpointing": {**FP8, **LORA, **FULL},
}

if __name__ == "__main__":
    backend = "cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    compare(__doc__ or "", VARIANTS, {})
    dist.destroy_process_group()
