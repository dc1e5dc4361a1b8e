"""Times variants of one job in one run, each in a process of its own, without Ray.

    python jobs/benchmarks/side_by_side.py JOB.yaml [--out FILE] [--repeat]
        --variant NAME [key=value ...] [--variant NAME [key=value ...]] ...

The first variant is what the others are measured by; --repeat runs it again at the end, to show
what of a difference is noise. The model is not exported. Prints a table and writes figures,
versions and the command as JSON.
"""

import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIGURES = (
    "step_seconds",
    "tokens_per_second_per_worker",
    "peak_memory_gib",
    "mfu_bf16",
    "world_size",
    "device",
    "versions",
    "proof",
)


def run_one(arguments: list[str]) -> None:
    """Train one variant in this process, and write its figures into the file named last."""
    from raytrain_adv.config import load
    from raytrain_adv.run.run import local_run
    from raytrain_adv.worker.train import train

    job = load(arguments[0], arguments[1:-1])
    run = local_run(job)
    figures = train(job, run, lambda *_: None)
    kept = {name: figures[name] for name in FIGURES}
    if run.is_main:
        Path(arguments[-1]).write_text(json.dumps(kept))


def measured(job: str, name: str, keys: list[str]) -> dict[str, object]:
    """Return the figures of one variant, or the end of what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        fixed = ["export_model=false", "save_strategy=no", f"output_dir={folder}/out"]
        command = [sys.executable, __file__, "--one", job, *keys, *fixed, str(file)]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            return {"keys": keys, "error": (done.stdout + done.stderr)[-2000:]}
        return {"keys": keys, **json.loads(file.read_text())}


def variants_of(arguments: list[str]) -> dict[str, list[str]]:
    """Return name -> keys from what follows each --variant."""
    found: dict[str, list[str]] = {}
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument == "--variant":
            found[following] = []
        elif found and argument != next(reversed(found)):
            found[next(reversed(found))].append(argument)
    return found


def main(arguments: list[str]) -> None:
    """Run the variants one after another."""
    if arguments[:1] == ["--one"]:
        run_one(arguments[1:])
        return
    start = arguments.index("--variant")
    options, rest = arguments[1:start], arguments[start:]
    variants = variants_of(rest)
    if "--repeat" in options:
        first = next(iter(variants))
        variants[f"{first} again"] = variants[first]
    results: dict[str, dict[str, object]] = {}
    for name, keys in variants.items():
        results[name] = measured(arguments[0], name, keys)
        print(f"{name}: {results[name].get('error', 'done')}", flush=True)
    if "--out" in options:
        record = {
            "date": str(date.today()),
            "command": " ".join(["python jobs/benchmarks/side_by_side.py", *arguments]),
            "runs": results,
        }
        Path(options[options.index("--out") + 1]).write_text(json.dumps(record, indent=1) + "\n")
    base = next(iter(results.values()))
    print(f"\n{'':28}{'s/step':>8}{'tokens/s':>10}{'GiB':>7}{'time':>7}{'memory':>8}")
    for name, found in results.items():
        if "error" in found or "error" in base:
            continue
        step, gib = float(found["step_seconds"]), float(found["peak_memory_gib"])  # type: ignore[arg-type]
        times = step / float(base["step_seconds"])  # type: ignore[arg-type]
        memory = gib / float(base["peak_memory_gib"])  # type: ignore[arg-type]
        rate = float(found["tokens_per_second_per_worker"])  # type: ignore[arg-type]
        print(f"{name:28}{step:8.3f}{rate:10,.0f}{gib:7.1f}{times:7.2f}{memory:8.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
