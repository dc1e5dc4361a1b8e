"""What Ray, reporting and metrics add to a training step: the same loop with and without Ray.

    python jobs/benchmarks/step_overhead.py [--rounds 3] [--steps 300] [--out FILE]
    ... --job jobs/benchmarks/llama3_8b_bf16.yaml [key=value ...]       another job, on a GPU

Trains a tiny model on one CPU worker, in turn through the launch command's own line and without
Ray (worker.run.local_run), and times on the worker what belongs to them: the loop's log, in it the
report to Ray, and the look for a request to stop. The figures are milliseconds. A report is made
every 2 s at most, so that its share of a step of another length is computed: in `per_8b_step_ms`

    log + look for a stop + report x step / 2 s,    step = 741 ms

the 8B step on one H200 (results/fp8_pairs.json), with every step logged. Computed from a CPU's
times: other work on the machine shows in them (`load_at_the_end`, and steps that take longer than
some 30 ms), in the means most and in the least times hardly. Whole steps are compared too, as a
check that nothing is left out, which says something on an idle machine only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STEP_MS = 741.0
"""Step of the 8B shape on one H200."""


def time_calls(seconds: dict[str, list[float]], *, with_ray: bool) -> None:
    """Time the calls of interest in this process from now on."""
    from raytrain_adv.worker import loop

    def timed(owner: Any, name: str, label: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)
        seconds[label] = []

        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = original(*args, **options)
            seconds[label].append(time.perf_counter() - start)
            return result

        setattr(owner, name, call)

    timed(loop, "log", "log")
    if with_ray:
        from raytrain_adv.driver.training.prometheus import RunMetrics
        from raytrain_adv.driver.training.worker_entry import RayReporter

        timed(RayReporter, "metrics", "report")
        timed(RayReporter, "stop_requested", "stop_requested")
        timed(RunMetrics, "_export", "exported")


def worker(config: dict[str, Any]) -> dict[str, Any]:
    """Be ray_worker, and leave its times beside the metrics; the driver sends this to the worker
    by value.
    """
    from raytrain_adv.driver.training.worker_entry import ray_worker

    seconds: dict[str, list[float]] = {}
    time_calls(seconds, with_ray=True)
    figures = ray_worker(config)
    Path(config["job"].output.output_dir, "times.json").write_text(json.dumps(seconds))
    return figures


def run_once(path: str, with_ray: bool) -> None:
    """Train once in this process (and Ray's)."""
    from raytrain_adv.config import load

    job = load(path)
    if with_ray:
        from raytrain_adv.driver.training import run, trainer

        trainer.ray_worker = worker
        run.run(job)
        return
    from raytrain_adv.run.run import local_run
    from raytrain_adv.worker.train import train

    seconds: dict[str, list[float]] = {}
    time_calls(seconds, with_ray=False)
    run = local_run(job)
    train(job, run, lambda *_: None)
    run.close()
    Path(job.output.output_dir, "times.json").write_text(json.dumps(seconds))


def job_file(folder: Path, name: str, options: argparse.Namespace) -> Path:
    """Write the job of a run; return its file."""
    import yaml
    from start_up import write_job

    path = write_job(folder, options.steps)
    keys = yaml.safe_load(path.read_text())
    if options.job is not None:
        keys = yaml.safe_load(options.job.read_text())
        for item in options.keys:
            key, _, value = item.partition("=")
            keys[key] = yaml.safe_load(value)
        keys |= {"max_steps": options.steps, "logging_steps": 1, "export_model": False}
    keys |= {"output_dir": str(folder / name), "ray_num_workers": 1}
    path.write_text(yaml.safe_dump(keys))
    return path


def measured(folder: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return a run's milliseconds: of its steps, and of each call of interest."""
    path = job_file(folder, name, options)
    temporary = Path(tempfile.mkdtemp(prefix="so", dir="/tmp"))  # sockets' paths must be short
    environment = {**os.environ, "RAY_TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    environment["RAY_AUTH_MODE"] = "disabled"  # or Ray writes a token into the home folder
    environment["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, __file__, "--one", name.partition("_")[0], str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    shutil.rmtree(temporary, ignore_errors=True)
    if done.returncode:
        raise SystemExit(f"{name}: {(done.stdout + done.stderr)[-3000:]}")
    return times_of(folder / name, options.skip)


def times_of(out: Path, skip: int) -> dict[str, Any]:
    """Return what `measured` does, from the run's folder, without the first steps."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    seconds = json.loads((out / "times.json").read_text())
    kept = {label: times[1 if label == "report" else skip :] for label, times in seconds.items()}
    return {
        "step_ms": [1e3 * row["step_s"] for row in rows[skip:]],
        **{label: [1e3 * one for one in times] for label, times in kept.items()},
    }


def summary(values: list[float]) -> dict[str, float]:
    """Return how many there are, their least, quartiles and mean."""
    low, middle, high = statistics.quantiles(values, n=4)
    found = {"least": min(values), "low": low, "median": middle, "high": high}
    found["mean"] = statistics.fmean(values)
    return {"count": len(values), **{name: round(value, 4) for name, value in found.items()}}


def main() -> None:
    """Run in turn, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--skip", type=int, default=5, help="first steps that do not count")
    parser.add_argument("--job", type=Path, help="train this job and not the tiny one")
    parser.add_argument("keys", nargs="*", metavar="key=value", help="that job's, changed")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    if options.one:
        run_once(options.one[1], options.one[0] == "ray")
        return
    folder = Path(tempfile.mkdtemp(prefix="step_overhead_"))
    runs: dict[str, dict[str, list[float]]] = {"plain": {}, "ray": {}}
    for number in range(options.rounds):
        for kind in runs:
            found = measured(folder, f"{kind}_{number}", options)
            for label, values in found.items():
                runs[kind].setdefault(label, []).extend(values)
            print(f"{kind}: {statistics.median(found['step_ms']):.2f} ms a step", flush=True)
            figures = record(runs, options) if runs["ray"] else {}
            if options.out is not None and figures:
                options.out.write_text(json.dumps(figures, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(figures, indent=1))


def device() -> str:
    """Return what was trained on."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def record(runs: dict[str, dict[str, list[float]]], options: argparse.Namespace) -> dict[str, Any]:
    """Return what is written."""
    from raytrain_adv.hardware import package_versions
    from raytrain_adv.run.run import REPORT_EVERY_S

    ray, plain = runs["ray"], runs["plain"]

    def per_8b_step(middle: Callable[[list[float]], float]) -> dict[str, float]:
        # The log of the line without Ray: a report would be in the other's.
        parts = {
            "log": middle(plain["log"]),
            "stop_requested": middle(ray["stop_requested"]),
            "report": middle(ray["report"]) * STEP_MS / (1e3 * REPORT_EVERY_S),
        }
        whole = sum(parts.values())
        shown = {**parts, "all": whole}
        return {k: round(v, 4) for k, v in shown.items()} | {"share": round(whole / STEP_MS, 6)}

    figures: dict[str, Any] = {
        "date": str(date.today()),
        "command": " ".join(["python", *sys.argv]),
        "device": device(),
        "cores": len(os.sched_getaffinity(0)),
        "load_at_the_end": round(os.getloadavg()[0], 1),
        "versions": {k: v for k, v in package_versions().items() if v is not None},
        "ms": {kind: {k: summary(v) for k, v in found.items()} for kind, found in runs.items()},
        "with_to_without_ray": {
            name: round(middle(ray["step_ms"]) / middle(plain["step_ms"]), 6)
            for name, middle in (("median", statistics.median), ("mean", statistics.fmean))
        },
    }
    if options.job is None:  # on a GPU the log waits for the step: its time is not its own
        figures["per_8b_step_ms"] = {
            "computed": True,
            "by_least": per_8b_step(min),
            "by_medians": per_8b_step(statistics.median),
            "by_means": per_8b_step(statistics.fmean),
        }
    return figures


if __name__ == "__main__":
    main()
