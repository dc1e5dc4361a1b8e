"""FSDP2's collectives by NCCL's kernels and by copies between the GPUs of one host: step times.

    python -m torch.distributed.run --nproc_per_node 2 jobs/benchmarks/fsdp_collectives.py \\
        [--only NAME ...] [--waits] [--out FILE]

Without torch.distributed.run it measures one GPU. The loop alone, on the 8B shape; for runs through
Ray see fp8_two_gpus.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import whole_steps
from torch.profiler import ProfilerActivity, profile

from raytrain_adv.ops.peer_copies import held_gib
from raytrain_adv.run.run import local_run

FP8 = {"fp8": True}
GATHERED = {**FP8, "fp8_enable_fsdp_float8_all_gather": True}
NCCL, COPIES = {"fsdp_collectives": "nccl"}, {"fsdp_collectives": "auto"}
WHOLE = {"fsdp_reshard_after_forward": False}
LORA = {"finetuning_type": "lora", "lora_rank": 16, "lora_target": "all"}
QAT = {"enable_qat": True, "qat_weight_dtype": "int4"}
FULL = {"disable_gradient_checkpointing": False, "gradient_checkpointing": "full"}
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16, nccl": NCCL,
    "bf16": COPIES,
    "fp8, nccl": {**FP8, **NCCL},
    "fp8": {**FP8, **COPIES},
    "fp8, whole": {**FP8, **COPIES, **WHOLE},
    "fp8 all-gather, nccl": {**GATHERED, **NCCL},
    "fp8 all-gather": {**GATHERED, **COPIES},
    "fp8, QAT": {**FP8, **QAT, **COPIES},
    "fp8, LoRA": {**FP8, **LORA, **COPIES},
    "fp8, full checkpointing": {**FP8, **FULL, **COPIES},
    "bf16, LoRA": {**LORA, **COPIES},
    "bf16, full checkpointing": {**FULL, **COPIES},
}
LONG_US = 20


def waits(step: Callable[[], float], steps: int = 2) -> dict[str, Any]:
    """Return per step, in ms: how long each stream is busy, its longest kernels, and what the
    compute stream waits between; "host" where the kernel was launched just before it began.
    """
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as taken:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        taken.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    launched = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    streams, kernels = defaultdict(list), defaultdict(float)
    for e in events:
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            streams[e["args"]["stream"]].append(e)
            kernels[f"{e['args']['stream']} {e['name'][:60]}"] += e["dur"] / steps / 1e3
    busy = {k: sum(e["dur"] for e in v) / steps / 1e3 for k, v in streams.items()}
    compute = sorted(streams[max(busy, key=busy.__getitem__)], key=lambda e: e["ts"])
    gaps: dict[str, float] = defaultdict(float)
    for before, after in pairwise(compute):
        gap = after["ts"] - before["ts"] - before["dur"]
        if gap > LONG_US:
            late = after["ts"] - launched.get(after["args"].get("correlation"), 0) < 3 * LONG_US
            cause = "host" if late else "stream"
            gaps[f"{before['name'][:34]} | {after['name'][:34]} | {cause}"] += gap / steps / 1e3

    def longest(found: dict[str, float], count: int) -> list[Any]:
        return sorted(found.items(), key=lambda item: -item[1])[:count]

    return {"streams": busy, "gaps": longest(gaps, 12), "kernels": longest(kernels, 25)}


def measured(name: str, steps: int, tokens: int, watches: bool) -> dict[str, Any]:
    """Return the figures of one variant, the same sequence on every rank."""
    job = whole_steps.job_of({}, loss_kernel="chunked", **VARIANTS[name])
    if "RANK" in os.environ and not dist.is_initialized():
        local_run(job)
    step = whole_steps.Whole.of(job).stepper(tokens)
    losses = [step() for _ in range(4)]
    whole_steps.reset_peak()
    whole_steps.wait()
    start = time.perf_counter()
    losses += [step() for _ in range(steps)]
    seconds = (time.perf_counter() - start) / steps
    return {
        "seconds": seconds,
        "tokens_per_second_per_gpu": tokens / seconds,
        "peak_gib": whole_steps.peak_gib() + held_gib(),
        "losses": losses,
        **(waits(step) if watches else {}),
    }


def main() -> None:
    """Measure the variants in turn; rank 0 prints and writes after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=10, help="measured, after four")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--waits", action="store_true", help="what the GPU waits for, by a trace")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    chosen = parser.parse_args()
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    whole_steps.DEVICE = torch.device("cuda", rank)
    torch.cuda.set_device(rank)
    results = whole_steps.head_of_results("python -m torch.distributed.run " + " ".join(sys.argv))
    results["figures"] = {}
    for name in chosen.only:
        found = measured(name, chosen.steps, chosen.tokens, chosen.waits)
        results["figures"][name] = found
        whole_steps.free()
        if rank == 0:
            speed = f"{1e3 * found['seconds']:8.1f} ms {found['tokens_per_second_per_gpu']:8.0f}"
            print(f"{name:<26}{speed} tokens/s {found['peak_gib']:6.1f} GiB", flush=True)
            if chosen.out is not None:
                chosen.out.write_text(json.dumps(results, indent=1) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
