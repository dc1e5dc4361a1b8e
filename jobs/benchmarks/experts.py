"""Mixtures of experts on one GPU: every method, and the HF Trainer, at real widths and few layers.

    python jobs/benchmarks/experts.py qwen3-30b-a3b --out jobs/benchmarks/results/experts_qwen3.json
    python jobs/benchmarks/experts.py gpt-oss-20b --out jobs/benchmarks/results/experts_gpt_oss.json
    python jobs/benchmarks/experts.py mixtral-8x7b --only full fp8 "fp8, experts in bf16" \\
        --out jobs/benchmarks/results/experts_mixtral.json
    ... --only full qlora          some of them
    ... --layers 4 --tokens 4096   smaller

Random weights in bf16; layers are compiled. LoRA reaches attention and all experts, on both sides.
gpt-oss recomputes its layers: its attention has sinks, which are computed from a mask. A row is
printed and written as soon as it is measured; what fails is a row too. `graph_breaks` has why
torch.compile left something of a layer to Python. MFU counts active experts only, and no
recomputation.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from transformers import AutoConfig
from whole_steps import DEVICE, Whole, free, head_of_results, job_of, measured

from raytrain_adv.estimate.flops import training_flops_per_token
from raytrain_adv.hardware import peak_flops

ATTENTION = {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 8,
        "head_dim": 128,
        "norm_topk_prob": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "num_hidden_layers": 8,
        "num_local_experts": 32,
        **ATTENTION,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "num_hidden_layers": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
}
"""Name -> keys of the config that differ from its class's; the published models have 48, 24 and 32
layers."""
TOKENS = {"qwen3-30b-a3b": 8192, "gpt-oss-20b": 4096, "mixtral-8x7b": 8192}
RECOMPUTED = {"disable_gradient_checkpointing": False, "gradient_checkpointing": "full"}
LORA = {"finetuning_type": "lora", "lora_rank": 16}
QAT = {
    "enable_qat": True,
    "qat_activation_dtype": "none",
    "qat_weight_dtype": "int4",
    "qat_group_size": 32,
    "qat_quantize_embedding": False,
}
FP8 = {"fp8": True, "fp8_allow_cpu": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "fp8": FP8,
    "fp8, experts in bf16": {**FP8, "fp8_experts": False},
    "qat int4": QAT,
    "lora": LORA,
    "qlora": {**LORA, "quantization_bit": 4},
}
TRAINER = {
    "HF Trainer, full": ["--eager"],
    "HF Trainer, full, compiled": [],
    "HF Trainer, PEFT's lora": ["--eager", "--lora"],
}
SECONDS = 100
"""What the HF Trainer may take; compiling a whole mixture has no bound."""


def trained(folder: Path, tokens: int, steps: int, keys: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of this package's steps: measured beside predicted."""
    counters.clear()
    keys = {"loss_kernel": "chunked", **keys}
    began = time.perf_counter()
    whole = Whole.of(job_of({}, folder, **keys))
    flops = training_flops_per_token(whole.model, tokens)
    predicted = whole.predicted_gib(tokens)
    found = measured(whole.stepper(tokens), steps, warm_up=3)
    return {
        "step_s": found["seconds"],
        "peak_gib": found["peak_gib"],
        "predicted_gib": predicted,
        "flops_per_token": flops,
        "graph_breaks": dict(counters["graph_break"]),
        "whole_s": time.perf_counter() - began,
    }


def hf_trainer(folder: Path, tokens: int, steps: int, options: list[str]) -> dict[str, Any]:
    """Return the figures of the HF Trainer, from a process of its own."""
    script = str(Path(__file__).with_name("hf_trainer.py"))
    size = ["--tokens", str(tokens), "--steps", str(steps)]
    command = [sys.executable, script, "--model", str(folder), *size, *options]
    began = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {SECONDS} s"}
    if done.returncode:
        return {"error": done.stderr.strip()[-600:]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "whole_s": time.perf_counter() - began}


def figures(row: dict[str, Any], tokens: int, flops: float) -> dict[str, Any]:
    """Return a row with what follows from its seconds."""
    if "step_s" not in row:
        return row
    rate = tokens / row["step_s"]
    peak = peak_flops(torch.cuda.get_device_name()) if DEVICE.type == "cuda" else None
    return {**row, "tokens_s": rate, "mfu_bf16": rate * flops / peak if peak else None}


def show(name: str, row: dict[str, Any]) -> None:
    """Print a row."""
    if "tokens_s" not in row:
        print(f"{name:<28} {row.get('error', row.get('out_of_memory'))}", flush=True)
        return
    gib, mfu = row["peak_gib"] or 0.0, row["mfu_bf16"] or 0.0
    line = f"{1e3 * row['step_s']:9.1f} ms {row['tokens_s']:9,.0f} tokens/s {mfu:6.1%} MFU"
    line += f" {gib:7.2f} GiB"
    if "predicted_gib" in row:
        line += f", predicted {row['predicted_gib']:7.2f}"
    if breaks := row.get("graph_breaks"):
        line += f"; {sum(breaks.values())} graph breaks"
    print(f"{name:<28} {line} ({row['whole_s']:.0f} s in all)", flush=True)


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--only", nargs="*", default=[], help="names of the rows")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--steps", type=int, default=5, help="measured, after three")
    parser.add_argument("--changed", default="{}", help="config keys, as JSON, for a trial")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    chosen = parser.parse_args()
    keys = {**SHAPES[chosen.shape], **json.loads(chosen.changed)}
    if chosen.layers:
        keys["num_hidden_layers"] = chosen.layers
    tokens = chosen.tokens or TOKENS[chosen.shape]
    recomputes = chosen.shape == "gpt-oss-20b"
    folder = Path(tempfile.mkdtemp(prefix="experts-"))
    AutoConfig.for_model(**keys).save_pretrained(folder)
    rows: dict[str, dict[str, Any]] = {}
    results = head_of_results(" ".join(["python", *sys.argv]))
    results |= {"shape": keys, "tokens": tokens, "rows": rows}
    flops: dict[bool, float] = {}
    for name in chosen.only or [*VARIANTS, *TRAINER]:
        is_lora = "lora" in name
        try:
            if name in VARIANTS:
                given = {**VARIANTS[name], **(RECOMPUTED if recomputes else {})}
                row = trained(folder, tokens, chosen.steps, given)
                flops.setdefault(is_lora, row["flops_per_token"])
            else:
                more = ["--checkpointing", "--attention", "eager"] if recomputes else []
                row = hf_trainer(folder, tokens, chosen.steps, [*TRAINER[name], *more])
        except Exception as error:  # a row that fails is a result too, and the others go on
            row = {"error": f"{type(error).__name__}: {error}"[:600]}
        free()
        rows[name] = figures(row, tokens, flops.get(is_lora, 0.0))
        show(name, rows[name])
        if chosen.out is not None:
            chosen.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    backend = "cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    main()
    dist.destroy_process_group()
