"""Fill in the report from the job, the workers' figures and metrics.jsonl."""

from __future__ import annotations

import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrain_adv.config.job import JobConfig
from raytrain_adv.config.sweep import CONVERTED_LOSS
from raytrain_adv.errors import Stopped
from raytrain_adv.report.parts import Baseline, Point, Sample, Start, TransformReport
from raytrain_adv.report.record import OF_CONVERTED, RunReport, describe_failure
from raytrain_adv.report.record import read as read_report
from raytrain_adv.report.variants import converted_loss, recovered, variants
from raytrain_adv.storage.metrics_file import FILE_NAME, best_step, read
from raytrain_adv.transforms.transform import Plan

if TYPE_CHECKING:
    from raytrain_adv.estimate.memory import MemoryPrediction


def started(job: JobConfig, run_name: str, began: float | None = None) -> RunReport:
    """Return the report of a run that began then, in unix seconds, or begins now: its job."""
    name = job.model.model_name_or_path
    trusted = f"trust_remote_code: true ran whatever model code comes with {name}."
    return RunReport(
        status="running",
        run_name=run_name,
        command=command_line(),
        started_at=began or time.time(),
        job=job.flat(),
        job_file=job.source,
        overrides=tuple(a for a in sys.argv[1:] if "=" in a and not a.startswith("-")),
        notes=(*job.notes, trusted) if job.model.trust_remote_code else job.notes,
    )


def command_line() -> str:
    """Return the command that started this process, in the words to start it again."""
    spec = sys.modules["__main__"].__spec__  # of a module that -m runs
    words = [Path(sys.argv[0]).name] if spec is None else ["python", "-m", spec.name]
    return shlex.join([*words, *sys.argv[1:]])


def planned(
    report: RunReport, world_size: int, predicted: MemoryPrediction, transforms: Mapping[str, Plan]
) -> RunReport:
    """Return the report of a run whose plan is made."""
    return _updated(
        report,
        world_size=world_size,
        predicted_memory_gib=predicted.total,
        predicted_memory=predicted.as_dict(),
        transforms={name: TransformReport.of(plan) for name, plan in transforms.items()},
    )


def _updated(report: RunReport, **changed: Any) -> RunReport:
    return RunReport(**{**report.model_dump(), **changed})


def finished(
    report: RunReport, figures: dict[str, Any], timeline: dict[str, float], folder: Path
) -> RunReport:
    """Return the report of a run that reached its end, from the one written at the start, rank 0's
    figures, the driver's phases in seconds (the last, `training`, is split), and metrics.jsonl.
    """
    same = (
        "world_size device attention attention_trial collectives sequence_parallel cuda_graph "
        "compiled model_notes versions steps total_steps epochs step_seconds "
        "tokens_per_second_per_worker peak_memory_gib data_wait_seconds predicted_memory_gib "
        "predicted_memory mfu_bf16 restarts skipped_steps resumed_from_step data batch model_dir "
        "model_gib"
    )
    proofs = figures["proof"]
    plans = figures["transforms"].items()
    rows = read(folder / FILE_NAME)
    return _updated(
        report,
        status="done",
        finished_at=time.time(),
        transforms={name: TransformReport.of(plan, proofs.get(name)) for name, plan in plans},
        samples=tuple(Sample(**sample) for sample in figures["samples"]),
        timeline=_with_workers(timeline, figures),
        **_logged(report, rows),
        **{CONVERTED_LOSS: converted_loss(rows)},
        **{name: figures[name] for name in same.split()},
        **{name: figures[name] for name in OF_CONVERTED if name in figures},
    )


def failed(
    report: RunReport, error: BaseException, timeline: dict[str, float], folder: Path
) -> RunReport:
    """Return the report of a run that failed or was stopped, with what it had reached."""
    rows = read(folder / FILE_NAME)
    begun = [row for row in rows if row.get("event") == "plan"]
    trained = [row for row in rows if row.get("kind") == "train"]
    same = ("total_steps", "resumed_from_step", "restarts", "world_size") if begun else ()
    return _updated(
        report,
        status="stopped" if isinstance(error, (Stopped, KeyboardInterrupt)) else "failed",
        finished_at=time.time(),
        error=str(error) or type(error).__name__,
        failure=describe_failure(error),
        steps=max((row["step"] for row in trained), default=0),
        peak_memory_gib=max((row["peak_memory_gib"] for row in trained), default=None),
        timeline=timeline,
        skipped_steps=max((row.get("num_skipped", 0) for row in trained), default=0),
        **_medians(trained),
        **_logged(report, rows),
        **{name: begun[-1].get(name) for name in same},
    )


def _with_workers(timeline: dict[str, float], figures: dict[str, Any]) -> dict[str, float]:
    """Return the phases with `training` split: until train() began, rank 0's phases, the rest."""
    phases = dict(timeline)
    training = phases.pop("training")
    start = max(figures["began_at"] - (time.time() - training), 0.0)
    own: dict[str, float] = figures["timeline"]
    rest = max(training - start - sum(own.values()), 0.0)
    return {**phases, "workers start": start, **own, "the rest": rest}


def _medians(trained: list[dict[str, Any]]) -> dict[str, float]:
    """Return the medians over logged steps, without the first, which includes compilation."""
    keys = {name: name for name in ("tokens_per_second_per_worker", "mfu_bf16")}
    keys["step_seconds"] = "step_s"
    rows = trained[1:] or trained
    values = {name: [row[key] for row in rows if row.get(key)] for name, key in keys.items()}
    return {name: statistics.median(found) for name, found in values.items() if found}


def against(report: RunReport, job: JobConfig) -> RunReport:
    """Return the report compared with the run of compare_with, if any. Raises StorageError."""
    folder = job.output.compare_with
    if folder is None:
        return report
    other = read_report(folder)
    baseline = Baseline(
        output_dir=folder,
        changed_keys=tuple(job.differences(dict(other.job))),
        train_loss=other.train_loss,
        eval_loss=other.eval_loss,
        final_eval_loss_change=_change(report.eval_loss, other.eval_loss),
        speedup=_ratio(report.tokens_per_second_per_worker, other.tokens_per_second_per_worker),
        memory_ratio=_ratio(report.peak_memory_gib, other.peak_memory_gib),
    )
    return report.model_copy(update={"baseline": baseline})


def starts(rows: Sequence[Mapping[str, Any]]) -> tuple[Start, ...]:
    """Return the starts of the workers that reached their plan, from rows of metrics.jsonl."""
    found: list[Start] = []
    places: Mapping[str, Any] = {}
    for row in rows:
        if row.get("event") == "workers":
            places = row
        elif row.get("event") == "plan" and row.get("world_size"):
            nodes, lost = (tuple(str(places.get(key, "")).split()) for key in ("nodes", "lost"))
            step, workers = row.get("resumed_from_step") or 0, row["world_size"]
            found.append(
                Start(step=step, time=row.get("time"), workers=workers, nodes=nodes, lost=lost)
            )
            places = {}
    return tuple(found)


def _change(mine: tuple[Point, ...], other: tuple[Point, ...]) -> float | None:
    if not mine or not other or mine[-1][0] != other[-1][0]:
        return None
    ratio = _ratio(mine[-1][1], other[-1][1])
    return None if ratio is None else ratio - 1.0


def _ratio(mine: float | None, other: float | None) -> float | None:
    return mine / other if mine is not None and other else None


def _logged(report: RunReport, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = variants(rows)
    faults = [str(row["message"]) for row in rows if row.get("event") == "fault"]
    dead = [str(row["message"]) for row in rows if row.get("event") == "dead_run"]
    losses = {
        f"{kind}_loss": [(row["step"], row["loss"]) for row in rows if row.get("kind") == kind]
        for kind in ("train", "eval")
    }
    evals = [row for row in rows if row.get("kind") == "eval" and "exact_answers" in row]
    return {
        **losses,
        "best_step": best_step(rows),
        "exact_answers": [(row["step"], row["exact_answers"]) for row in evals],
        "notes": (*report.notes, *faults),
        "warnings": tuple(dict.fromkeys(dead)),
        "starts": starts(rows),
        "variants": found,
        "recovered": recovered(found),
    }
