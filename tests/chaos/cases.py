"""Which job is hurt, what is killed in it, and when: drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

STEPS, EVERY = 60, 10
COMMON: dict[str, Any] = {
    "use_cpu": True,
    "ray_num_workers": 2,
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": EVERY,
    "save_total_limit": 2,
    "max_failures": 3,
    "val_size": 8,
    "preprocessing_num_workers": 2,
    "ray_init_kwargs": {"num_cpus": 2, "include_dashboard": False},
}
LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"}
QAT = {"enable_qat": True, "qat_weight_dtype": "int4", "fake_quant_after_n_steps": 25}
JOBS: dict[str, dict[str, Any]] = {
    "full": {},
    "QAT after 25 steps": QAT,
    "LoRA": LORA,
    "elastic": {"ray_num_workers": [1, 2], "per_device_train_batch_size": 2},
    "sweep": {"ray_num_workers": 1, "sweep": {"seed": [1, 2], "metric": "eval_loss"}},
    "20100 rows": {},  # enough for processes that tokenize
}
FP8 = {"fp8": True, "bf16": True, "fp8_allow_cpu": True, "fp8_min_features": 0}
RARE_JOBS: dict[str, dict[str, Any]] = {
    **JOBS,
    "FP8 all-gather": {**FP8, "fp8_enable_fsdp_float8_all_gather": True},
}
GPU_JOBS = {
    "FP8 all-gather, GPUs": {
        **RARE_JOBS["FP8 all-gather"],
        "fp8_allow_cpu": False,
        "use_cpu": False,
        "flash_attn": "disabled",  # the backward pass of others adds in any order on a GPU
        "ray_init_kwargs": {"num_cpus": 4, "num_gpus": 2, "include_dashboard": False},
    }
}
ALL_JOBS = {**RARE_JOBS, **GPU_JOBS}
ROWS = {"20100 rows": 20_100}
WHILE_TRAINING = ("worker 1", "rank 0", "controller", "raylet", "gcs_server", "driver")
MOMENTS = {
    "step": WHILE_TRAINING,
    "writing a checkpoint": WHILE_TRAINING,
    "starting": ("raylet", "gcs_server", "driver"),
    "tokenizing": ("tokenizer", "driver"),
    "exporting": ("rank 0", "driver", "raylet"),
}
RARE = {
    "workers starting": ("controller", "raylet", "gcs_server", "driver"),
    "loading the model": ("worker 1", "rank 0", "controller"),
    "resuming": ("worker 1", "rank 0", "controller", "driver"),
    "exporting": ("worker 1", "controller", "gcs_server"),
    "model written": ("controller", "driver", "raylet"),
    "between trials": ("driver", "raylet", "gcs_server"),
}
"""Moments that come once in a run, and last for less than a second. What resumes was killed before,
at a step."""


@dataclass(frozen=True)
class Case:
    """One kill. `step` counts only if `moment` is "step", `delay_s` only without a step."""

    number: int
    job: str
    moment: str
    target: str
    step: int
    delay_s: float

    @property
    def when(self) -> str:
        """The moment in words."""
        return f"step {self.step}" if self.moment == "step" else self.moment


def cases(seed: int, count: int, is_rare: bool = False, on_gpus: bool = False) -> Iterator[Case]:
    """Yield the cases of a seed: every moment, or rare one, with every target in a random order,
    again and again, each in a random job. Those of a smaller count are the first of a larger one.
    """
    moments, known = (RARE, RARE_JOBS) if is_rare else (MOMENTS, JOBS)
    known = GPU_JOBS if on_gpus else known
    number, draw = 0, random.Random(seed)
    while True:
        pairs = [(moment, target) for moment, targets in moments.items() for target in targets]
        draw.shuffle(pairs)
        for moment, target in pairs:
            jobs = [job for job in known if _fits(job, moment, target)]
            if not jobs:
                continue
            step, delay_s = draw.randrange(2, STEPS), draw.uniform(0.0, 2.0)
            number += 1
            if number > count:
                return
            yield Case(number, draw.choice(jobs), moment, target, step, round(delay_s, 3))


def _fits(job: str, moment: str, target: str) -> bool:
    if job in ROWS or moment == "tokenizing":
        return job in ROWS and moment == "tokenizing"
    if moment == "between trials":
        return job == "sweep"
    # A sweep's trials have one worker each, and rows of their own.
    return job != "sweep" or (moment in ("step", "starting") and target != "worker 1")
