"""Whether memory grows in a long run: 2,000 steps of a tiny model through the real launch, with
evaluations and checkpoints, while the memory of driver, workers and controller is looked at.

    python jobs/benchmarks/long_run.py [--out jobs/benchmarks/results/long_run.json]
    ... --steps 400 --workers 1

Figures are resident memory (RSS) in MiB, by the optimizer step that the run had logged when it was
looked at; `growth_mib_per_1000_steps` is the slope of a line through those after the first quarter,
by when everything has been used once.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from raytrain_adv import hardware

ROOT = Path(__file__).parents[2]
EVERY_S = 1.0
ROLES = {"RayTrainWorker": "worker", "TrainController": "controller"}
"""What Ray calls the processes of a run, and what they are called here."""
MIB = 2**20
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def job_in(folder: Path, steps: int, workers: int) -> Path:
    """Write the job and its model's config; return the job's path."""
    model = folder / "model"
    model.mkdir()
    for file in (ROOT / "jobs" / "models" / "tiny-llama").glob("*.json"):
        (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **TINY}))
    rows = [
        {"instruction": f"Count to {n % 9 + 1}.", "output": " ".join(map(str, range(n % 9 + 1)))}
        for n in range(512)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    keys = {
        "model_name_or_path": str(model),
        "train_from_scratch": True,
        "finetuning_type": "full",
        "dataset": str(folder / "rows.json"),
        "tokenized_path": str(folder / "tokenized"),
        "cutoff_len": 64,
        "val_size": 8,
        "eval_strategy": "steps",
        "eval_steps": steps // 10,
        "save_strategy": "steps",
        "save_steps": steps // 20,
        "save_total_limit": 2,
        "logging_steps": 1,
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 1,
        "learning_rate": 1.0e-3,
        "max_steps": steps,
        "disable_gradient_checkpointing": True,
        "num_sample_answers": 0,
        "use_cpu": True,
        "ray_num_workers": workers,
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(keys))
    return folder / "job.yaml"


def memory_of(driver: psutil.Process) -> dict[str, float]:
    """Return MiB by process: driver, controller, worker 0, ..."""
    found = {"driver": driver.memory_info().rss / MIB}
    workers = []
    for process in driver.children(recursive=True):
        try:
            title = " ".join(process.cmdline())
            role = next((name for sign, name in ROLES.items() if sign in title), None)
            if role == "worker":
                workers.append((process.pid, process.memory_info().rss / MIB))
            elif role is not None:
                found[role] = process.memory_info().rss / MIB
        except psutil.NoSuchProcess:
            continue
    return found | {f"worker {n}": rss for n, (_, rss) in enumerate(sorted(workers))}


def step_of(metrics: Path) -> int:
    """Return the last optimizer step that the run has logged, 0 before the first."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(metrics.stat().st_size - 4096, 0))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row.get("kind") == "train":
            return int(row["step"])
    return 0


def watch(job: Path, folder: Path) -> list[tuple[int, dict[str, float]]]:
    """Run the job; return (step, MiB by process), looked at every second."""
    command = [sys.executable, "-m", "raytrain_adv.launch", str(job)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    seen: list[tuple[int, dict[str, float]]] = []
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as run:
        driver = psutil.Process(run.pid)
        while run.poll() is None:
            try:
                step, memory = step_of(folder / "out" / "metrics.jsonl"), memory_of(driver)
            except psutil.NoSuchProcess:
                break
            if step and "worker 0" in memory:
                seen.append((step, memory))
            time.sleep(EVERY_S)
    if run.returncode != 0:
        raise SystemExit(f"the run failed, exit code {run.returncode}")
    return seen


def figures(seen: Sequence[tuple[int, dict[str, float]]], steps: int) -> dict[str, Any]:
    """Return what each process took over the steps, and how much that grew."""
    found: dict[str, Any] = {}
    names = sorted({name for _, memory in seen for name in memory})
    for name in names:
        points = [(step, memory[name]) for step, memory in seen if name in memory]
        late = [point for point in points if steps / 4 <= point[0] < steps]
        if len(late) < 3:
            continue
        slope = statistics.linear_regression(*zip(*late, strict=True)).slope
        found[name] = {
            "mib_by_step": {step: round(mib, 1) for step, mib in _thinned(points, steps)},
            "growth_mib_per_1000_steps": round(slope * 1000, 2),
            "peak_mib": round(max(mib for _, mib in points), 1),
        }
    return found


def _thinned(points: Sequence[tuple[int, float]], steps: int) -> list[tuple[int, float]]:
    """Return the points nearest to each tenth of the run."""
    wanted = [steps * tenth // 10 for tenth in range(11)]
    nearest = {min(points, key=lambda point: abs(point[0] - at)) for at in wanted}
    return sorted(nearest)


def main() -> None:
    """Run it, say what it took, and write it down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    chosen = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="long_run_") as name:
        folder = Path(name)
        seen = watch(job_in(folder, chosen.steps, chosen.workers), folder)
    processes = figures(seen, chosen.steps)
    for name, one in processes.items():
        print(
            f"{name:<11} {one['growth_mib_per_1000_steps']:+8.2f} MiB per 1,000 steps, "
            f"peak {one['peak_mib']:,.0f} MiB: {one['mib_by_step']}"
        )
    if chosen.out is None:
        return
    facts = hardware.detect()
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python jobs/benchmarks/long_run.py --steps {chosen.steps} "
        f"--workers {chosen.workers}",
        "device": facts.device_name,
        "versions": {key: version for key, version in facts.versions.items() if version},
        "steps": chosen.steps,
        "workers": chosen.workers,
        "seconds": round(time.perf_counter() - began),
        "samples": len(seen),
        "processes": processes,
    }
    chosen.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
