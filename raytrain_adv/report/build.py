"""Fill in the report from the job, the workers' figures and metrics.jsonl."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from raytrain_adv.config.job import JobConfig
from raytrain_adv.report.record import RunReport, Sample, TransformReport, describe_failure
from raytrain_adv.worker.metrics_file import FILE_NAME, read


def started(job: JobConfig, run_name: str, world_size: int | None = None) -> RunReport:
    """Return the report of a run that begins: what was asked for, and when."""
    return RunReport(
        status="running",
        run_name=run_name,
        command=" ".join(sys.argv),
        started_at=time.time(),
        job=job.flat(),
        job_file=job.source,
        world_size=world_size,
    )


def finished(
    report: RunReport, figures: dict[str, Any], timeline: dict[str, float], folder: Path
) -> RunReport:
    """Return the report of a run that reached its end.

    Args:
        report: the one written at the start.
        figures: what rank 0's train() returned.
        timeline: the driver's phases; the workers' are put behind them.
        folder: output_dir, for the losses in metrics.jsonl.
    """
    update = {
        "status": "done",
        "finished_at": time.time(),
        "transforms": {
            name: TransformReport.of(plan) for name, plan in figures["transforms"].items()
        },
        "samples": tuple(Sample(**sample) for sample in figures["samples"]),
        "timeline": {**timeline, **figures["timeline"]},
        **_losses(folder),
    }
    same = (
        "world_size device versions steps total_steps epochs "
        "tokens_per_second_per_worker step_seconds peak_memory_gib "
        ""
        "data_wait_seconds predicted_memory_gib predicted_memory mfu_bf16 restarts "
        "resumed_from_step data batch model_dir"
    )
    update |= {name: figures[name] for name in same.split()}
    return RunReport(**{**report.model_dump(), **update})


def failed(
    report: RunReport, error: BaseException, timeline: dict[str, float], folder: Path
) -> RunReport:
    """Return the report of a run that ended in an error, with what it had reached."""
    losses = _losses(folder)
    steps = [step for step, _ in losses["train_loss"]]
    update = {
        "status": "failed",
        "finished_at": time.time(),
        "error": str(error) or type(error).__name__,
        "failure": describe_failure(error),
        "steps": max(steps, default=0),
        "timeline": timeline,
        **losses,
    }
    return RunReport(**{**report.model_dump(), **update})


def _losses(folder: Path) -> dict[str, list[tuple[int, float]]]:
    rows = read(folder / FILE_NAME)
    curves: dict[str, list[tuple[int, float]]] = {"train_loss": [], "eval_loss": []}
    for row in rows:
        if row.get("kind") in ("train", "eval"):
            curves[f"{row['kind']}_loss"].append((row["step"], row["loss"]))
    return curves
