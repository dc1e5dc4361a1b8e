"""Measure a run: speed, memory, time waiting for data; and open the file for the rows."""

import contextlib
import resource
import statistics
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import nn

from raytrain_adv.checkpoint.folders import Found
from raytrain_adv.config.job import JobConfig
from raytrain_adv.estimate.flops import training_flops_per_token
from raytrain_adv.hardware import peak_flops
from raytrain_adv.run.run import Run
from raytrain_adv.run.schedule import Arithmetic
from raytrain_adv.run.trackers import open_trackers
from raytrain_adv.storage.metrics_file import MetricsFile
from raytrain_adv.text import GIB

WARM_UP_STEPS = 3  # steps left out of medians: they compile, allocate and tune


def open_metrics(job: JobConfig, run: Run, arithmetic: Arithmetic, found: Found | None) -> None:
    """Open metrics.jsonl and the trackers on rank 0, without rows after the step resumed from."""
    if not run.is_main:
        return
    step = found.progress.step if found is not None else 0
    continues = found is not None or run.restarts > 0
    path = Path(job.output.output_dir) / "metrics.jsonl"
    file = MetricsFile(path, resume_step=step if continues else None)
    trackers = open_trackers(
        job, resume_step=step, emit=lambda slug, text: run.say(text, event=slug)
    )
    run.open_metrics(file, trackers)
    if run.resume and found is None:
        run.fault("There is no complete checkpoint to continue from: the run starts at step 0.")
    run.say(
        "the run in numbers",
        event="plan",
        total_steps=arithmetic.total_steps,
        resumed_from_step=step if found is not None else None,
        restarts=run.restarts,
        world_size=run.world_size,
    )


class Meter:
    """Times steps and counts tokens on one rank; waits for the GPU only at logging steps.
    `attended` is the mean length, over all tokens, of the sequence that each is in.
    """

    def __init__(self, run: Run, model: nn.Module, arithmetic: Arithmetic, attended: float) -> None:
        self.run = run
        self.arithmetic = arithmetic
        self.on_gpu = run.device.type == "cuda"
        self.flops_per_token = training_flops_per_token(model, attended)
        name = torch.cuda.get_device_name(run.device) if self.on_gpu else "cpu"
        self.peak = peak_flops(name)
        self.step_seconds = array("d")  # 8 bytes a step, where a list takes 32
        self.rates = array("d")  # tokens per second of this rank, per timed step
        self.waits = array("d")  # seconds per step that this rank waited for data, per logging step
        self.last_loss = float("nan")
        self.tokens_since_log = 0
        self.untimed_tokens = 0  # those of the first step, whose time does not count
        self.steps_since_log = 0
        self.paused_s = 0.0
        self.waited_at_log = 0.0
        self.norm: torch.Tensor | None = None
        self.step = 0  # the current optimizer step, from 0
        self._started = self._log_time = time.perf_counter()
        self._phases: set[str] = set()
        psutil.cpu_percent()  # its first answer is 0; each later one is since the one before
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(run.device)

    def start(self) -> None:
        """Note that the loop begins."""
        self._started = self._log_time = time.perf_counter()
        self.run.timeline |= {"first step": 0.0, "steps": 0.0}

    def stop(self) -> None:
        """Put the steps' time into the timeline, without what has its own entry there."""
        self._synchronize()
        self.run.heartbeat.stop()
        own = sum(self.run.timeline.get(name, 0.0) for name in ("first step", *self._phases))
        self.run.timeline["steps"] = time.perf_counter() - self._started - own

    def end(self, num_tokens: int, norm: torch.Tensor) -> None:
        """Note that the step is queued; its time counts at the next logging step."""
        self.tokens_since_log += num_tokens
        self.steps_since_log += 1
        self.norm = norm
        self.run.heartbeat.step_done()

    def first_step_done(self) -> None:
        """Report the first step's time, which the steps' time leaves out: it may compile."""
        self._synchronize()
        now = time.perf_counter()
        seconds = now - self._log_time - self.paused_s
        self._log_time, self.paused_s, self.steps_since_log = now, 0.0, 0
        self.untimed_tokens = self.tokens_since_log
        self.run.timeline["first step"] = seconds
        self.run.say(f"first step done in {seconds:.1f} s", event="first_step", seconds=seconds)

    @contextlib.contextmanager
    def paused(self, phase: str) -> Iterator[None]:
        """Count the time inside in the timeline's `phase`, not in the steps' time."""
        self._synchronize()
        start = time.perf_counter()
        with self.run.heartbeat.paused():
            yield
        self._synchronize()
        seconds = time.perf_counter() - start
        self.paused_s += seconds
        self._phases.add(phase)
        self.run.timeline[phase] = self.run.timeline.get(phase, 0.0) + seconds

    def _synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.run.device)

    def row(
        self, done: int, loss: float, label_tokens: float, lr: float, waited_s: float
    ) -> dict[str, Any]:
        """Return a row of metrics over the steps since the last one."""
        self._synchronize()
        now = time.perf_counter()
        elapsed = max(now - self._log_time - self.paused_s, 1e-9)
        steps, tokens = self.steps_since_log, self.tokens_since_log - self.untimed_tokens
        if not steps:  # the row is for the first step alone
            steps, tokens = 1, self.tokens_since_log
            elapsed = max(self.run.timeline.get("first step", elapsed), 1e-9)
        step_s, rate = elapsed / steps, tokens / elapsed
        self.step_seconds.extend([step_s] * steps)
        self.rates.extend([rate] * steps)
        # With on_bad_loss: skip perhaps no step counted.
        self.last_loss = loss / label_tokens if label_tokens else float("nan")
        row: dict[str, Any] = {
            "kind": "train",
            "step": done,
            "epoch": self.arithmetic.epoch_after(done),
            "loss": self.last_loss,
            "learning_rate": lr,
            "grad_norm": float(self.norm) if self.norm is not None else None,
            "step_s": step_s,
            "tokens_per_second_per_worker": rate,
            "mfu_bf16": self.mfu(rate),
            "peak_memory_gib": self.peak_memory_gib(),
            "data_wait_s": waited_s - self.waited_at_log,
            "num_label_tokens": int(label_tokens),
            # Of the whole node, since the last row: what else runs there slows training too.
            "cpu_percent": psutil.cpu_percent(),
            "host_memory_percent": psutil.virtual_memory().percent,
            **(gpu_state(self.run.device) if self.on_gpu else {}),
        }
        self.waits.append(row["data_wait_s"] / max(self.steps_since_log, 1))
        self._log_time, self.paused_s = now, 0.0
        self.steps_since_log, self.waited_at_log = 0, waited_s
        return row

    def take_tokens(self) -> int:
        """Return this rank's tokens since the last logging step and count from 0 again."""
        tokens, self.tokens_since_log, self.untimed_tokens = self.tokens_since_log, 0, 0
        return tokens

    def mfu(self, tokens_per_second: float) -> float | None:
        """Return the share of the GPU's dense bf16 peak that the model uses; None on CPU."""
        if self.peak is None:
            return None
        return tokens_per_second * self.flops_per_token / self.peak

    def peak_memory_gib(self) -> float:
        """Return the peak of allocated GPU memory so far, with buffers that peers read; on CPU of
        resident memory.
        """
        if self.on_gpu:
            from raytrain_adv.ops.peer_copies import held_gib

            return torch.cuda.max_memory_allocated(self.run.device) / GIB + held_gib()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def figures(self) -> dict[str, Any]:
        """Return the run's figures for the report; all ranks call it."""
        rates, seconds = (x[WARM_UP_STEPS:] or x for x in (self.rates, self.step_seconds))
        rate = statistics.median(rates) if rates else None
        peak = self.run.agree(int(self.peak_memory_gib() * 2**20), dist.ReduceOp.MAX) / 2**20
        return {
            "steps": self.arithmetic.total_steps,
            "total_steps": self.arithmetic.total_steps,
            "epochs": self.arithmetic.epochs,
            "step_seconds": statistics.median(seconds) if seconds else None,
            "tokens_per_second_per_worker": rate,
            "mfu_bf16": self.mfu(rate) if rate else None,
            "peak_memory_gib": peak,
            "data_wait_seconds": statistics.median(self.waits) if self.waits else None,
        }


def gpu_state(device: torch.device) -> dict[str, float]:
    """Return what the driver measures of a GPU: gpu_percent (time in which a kernel ran, over its
    last sample of at most 1 s), gpu_celsius, gpu_watts. Without those it does not tell, as of a MIG
    slice.
    """
    try:
        import pynvml  # torch reads its sensors through it
    except ModuleNotFoundError:
        return {}
    sensors: dict[str, Callable[[], float]] = {
        "gpu_percent": lambda: torch.cuda.utilization(device),
        "gpu_celsius": lambda: torch.cuda.temperature(device),
        "gpu_watts": lambda: torch.cuda.power_draw(device) / 1000,
    }
    found = {}
    for name, read in sensors.items():
        with contextlib.suppress(pynvml.NVMLError, RuntimeError):
            found[name] = float(read())
    return found
