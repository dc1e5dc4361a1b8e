"""Step time and memory over two GPUs: bf16, FP8, and FP8 that gathers its weights in FP8.

    python -m torch.distributed.run --nproc_per_node 2 jobs/benchmarks/fp8_two_gpus.py [--out FILE]

Trains the job of llama3_8b_bf16.yaml three times in one process group, and profiles a forward and
backward pass of the last. Without GPUs, to try the script itself:
    ... --set model_name_or_path=jobs/models/tiny-llama cutoff_len=64 use_cpu=true \\
        fp8_allow_cpu=true fp8_min_features=16 torch_compile=false max_steps=3 logging_steps=1
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from raytrain_adv.config import load
from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.batches.loader import Batches
from raytrain_adv.data.prepare import prepare
from raytrain_adv.ops.loss.function import loss_function
from raytrain_adv.run.run import Run, local_run
from raytrain_adv.run.schedule import resolve_arithmetic
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.worker.finish import Exported
from raytrain_adv.worker.train import train

ROOT = Path(__file__).parents[2]
VARIANTS = {
    "bf16": [],
    "fp8": ["fp8=true"],
    "fp8_all_gather": ["fp8=true", "fp8_enable_fsdp_float8_all_gather=true"],
}
STEPS = ["max_steps=12", "logging_steps=3"]
"""Medians are over the last nine: the first three compile, allocate and tune."""
FIGURES = ("step_seconds", "tokens_per_second_per_worker", "peak_memory_gib", "device", "versions")
MOST = 12
"""Kernels named, those that took longest."""


def profiled(model: Any, job: JobConfig, run: Run) -> dict[str, float]:
    """Return the milliseconds of each GPU kernel in a forward and backward pass; on a CPU, of each
    operator.
    """
    prepared = prepare(job, lambda *_: None, rebuild=False)
    arithmetic = resolve_arithmetic(job, len(prepared.train), run.world_size)
    batches = Batches(job, prepared.train, arithmetic, run.rank, 0)
    batch = batches.micro_batch(0, [run.rank])
    inputs = {name: value.to(run.device) for name, value in batch.inputs.items()}
    labels = batch.labels.to(run.device)
    loss_sum = loss_function(model, job.parallel.torch_compile)
    on_gpu = run.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds, acc_events=True) as seen:
        loss_sum(model, inputs, labels).backward()
        Transforms(job).after_step(model)
        if on_gpu:
            torch.cuda.synchronize(run.device)
    times: dict[str, float] = {}
    for event in seen.key_averages():
        if on_gpu and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        times[event.key[:120]] = times.get(event.key[:120], 0.0) + spent / 1e3
    longest = sorted(times, key=lambda name: -times[name])[:MOST]
    return {name: round(times[name], 3) for name in longest}


def measured(name: str, job_file: Path, overrides: list[str]) -> dict[str, Any]:
    """Train one variant on this rank and return its figures."""
    began = time.perf_counter()
    output = [f"output_dir=saves/fp8_two_gpus/{name}", *STEPS]
    others = [item for item in overrides if VARIANTS[name] or not item.startswith("fp8")]
    job = load(job_file, [*VARIANTS[name], *output, *others])
    run = local_run(job)
    kernels: dict[str, float] = {}

    def instead_of_export(model: Any, *_: Any) -> Exported:
        if name == "fp8_all_gather":
            kernels.update(profiled(model, job, run))
        return Exported()

    figures = train(job, run, instead_of_export)
    found = {key: figures[key] for key in FIGURES}
    found["whole_s"] = round(time.perf_counter() - began, 1)
    if kernels:
        found["ms_by_kernel"] = kernels
    return found


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Return one line for each variant."""
    lines = [f"{'':16}{'s/step':>9}{'tokens/s/GPU':>14}{'peak GiB':>10}"]
    for name, run in runs.items():
        lines.append(
            f"{name:16}{run['step_seconds']:9.4f}{run['tokens_per_second_per_worker']:14.0f}"
            f"{run['peak_memory_gib']:10.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the variants one after the other; rank 0 prints and writes, after each one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", type=Path, default=ROOT / "jobs/benchmarks/llama3_8b_bf16.yaml")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="job keys")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    chosen = parser.parse_args()
    say = partial(print, flush=True)
    found: dict[str, Any] = {
        "date": str(date.today()),
        "command": "python -m torch.distributed.run --nproc_per_node 2 " + " ".join(sys.argv),
        "runs": {},
    }
    for name in chosen.only:
        found["runs"][name] = measured(name, chosen.job, chosen.set)
        gc.collect()
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if dist.get_rank() == 0:
            say(json.dumps({name: found["runs"][name]}))
            if chosen.out is not None:
                chosen.out.write_text(json.dumps(found, indent=1) + "\n")
    if dist.get_rank() == 0:
        say(table(found["runs"]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
