"""The ratios that matter, on one GPU; fails where one falls more than 5 % under the stored one.

    python jobs/benchmarks/all.py --quick             under eight minutes on one H100 or H200
    python jobs/benchmarks/all.py --quick --store     and store them, for this GPU's name
    ... --only bf16 fp8      these variants, and the ratios that they give

Ratios are larger where better: seconds or peak memory of the one it is compared with, over its own,
both from this run on this card. --quick takes 16 of the 8B shape's 32 layers. A variant that fails
is a row with its error; the others are measured, in another process. Exit status: 0 if each stored
ratio was measured and held, 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
MOST_FALL = 0.05
Figures = dict[str, dict[str, Any]]


class Ratio(NamedTuple):
    """A variant's figure and the variant it is compared with."""

    variant: str
    base: str
    figure: str = "seconds"


STEPS = "bf16", "fp8", "fp8 head", "qat int4", "qat int8", "fp8, qat int4", "lora", "fp8, lora"
STEPS = *STEPS, "fp8 base", "qat w8a8"
LOSS = "torch", "chunked"
VARIANTS = {name: "whole" for name in STEPS} | {name: "loss" for name in LOSS}
VARIANTS |= {"135m bf16": "small", "HF Trainer": "hf_trainer"}
"""Name -> how it is measured, in this order."""
RATIOS = {
    "FP8": Ratio("fp8", "bf16"),
    "FP8, memory": Ratio("fp8", "bf16", "peak_gib"),
    "FP8 head": Ratio("fp8 head", "fp8"),
    "QAT int4": Ratio("qat int4", "bf16"),
    "QAT int8": Ratio("qat int8", "bf16"),
    "QAT for vLLM's W8A8": Ratio("qat w8a8", "bf16"),
    "QAT int4, memory": Ratio("qat int4", "bf16", "peak_gib"),
    "FP8 and QAT int4": Ratio("fp8, qat int4", "bf16"),
    "FP8 of LoRA": Ratio("fp8, lora", "lora"),
    "FP8 base of LoRA": Ratio("fp8 base", "lora"),
    "FP8 base of LoRA, memory": Ratio("fp8 base", "lora", "peak_gib"),
    "chunked loss": Ratio("chunked", "torch"),
    "chunked loss, memory": Ratio("chunked", "torch", "peak_gib"),
    # A step that is not recorded waits for the host, and hosts differ: 83 to 95 ms.
    "135M's recorded step and bf16": Ratio("135m bf16", "bf16"),
    "bf16 and the HF Trainer": Ratio("bf16", "HF Trainer"),
    "bf16 and the HF Trainer, memory": Ratio("bf16", "HF Trainer", "peak_gib"),
}


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    shape: dict[str, int]
    steps: int
    tokens: int = 8192
    small: dict[str, int] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)


TINY = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 128}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 1}
SIZES = {
    "quick": Size({"num_hidden_layers": 16}, 6),
    "full": Size({}, 12),
    "tiny": Size(
        TINY, 2, 32, {**TINY, "head_dim": 32, "vocab_size": 4096}, {"fp8_min_features": 0}
    ),
}


def measure(name: str, size: Size) -> dict[str, float]:
    """Return seconds and peak memory of one variant, in this process."""
    import fp8_pairs
    import lora_fp8_base
    import small_models
    from loss_kernels import alone
    from whole_steps import SHAPE, Whole, job_of, measured

    if VARIANTS[name] == "whole":
        keys = (lora_fp8_base.VARIANTS | fp8_pairs.VARIANTS)[name]
        keys = keys | (size.keys if "fp8" in keys else {})
        model = Whole.of(job_of(size.shape, loss_kernel="chunked", **keys))
        return measured(model.stepper(size.tokens), size.steps, warm_up=3)
    if VARIANTS[name] == "loss":
        config = json.loads((SHAPE / "config.json").read_text()) | size.shape
        found = alone(name, size.tokens, config["hidden_size"], config["vocab_size"], size.steps)
        return {"seconds": found["seconds"], "peak_gib": found["peak_over_hidden_gib"]}
    if VARIANTS[name] == "small":
        shape, keys = small_models.VARIANTS[name]
        small_models.SHAPES[shape] |= size.small
        found = small_models.run(shape, keys, 2048, 10 if size.small else 40, kernels=False)
        if "error" in found:
            raise RuntimeError(found["error"])
        return {"seconds": found["ms"] / 1e3, "peak_gib": found["peak_gib"]}
    command = [sys.executable, str(ROOT / "jobs/benchmarks/hf_trainer.py")]
    command += ["--shape", json.dumps(size.shape), "--steps", str(size.steps)]
    command += ["--tokens", str(size.tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if "out_of_memory" in found:
        raise RuntimeError(found["out_of_memory"])
    return {"seconds": found["step_s"], "peak_gib": found["peak_gib"] or 0.0}


def measure_here(names: list[str], size: Size) -> None:
    """Measure variants in this process, and print each as a line of JSON; end at one that fails."""
    import torch.distributed as dist
    from whole_steps import DEVICE, free, head_of_results

    print(json.dumps({"variant": None, **head_of_results("")}), flush=True)
    backend = "cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    for name in names:
        began = time.monotonic()
        found = measure(name, size)
        free()
        took = round(time.monotonic() - began, 1)
        print(json.dumps({"variant": name, **found, "took_s": took}), flush=True)
    dist.destroy_process_group()


class Run:
    """The measuring of variants within a time, written to a file after each."""

    def __init__(self, size: str, most_s: float, out: Path | None) -> None:
        self.size, self.most_s, self.out = size, most_s, out
        self.ends = time.monotonic() + most_s
        self.head: dict[str, Any] = {}
        self.figures: Figures = {}

    def measure(self, names: list[str]) -> None:
        """Measure the variants, in another process after one that fails."""
        while waiting := [name for name in names if name not in self.figures]:
            left = self.ends - time.monotonic()
            over = f"not measured: {self.most_s:g} s were over"
            if left <= 0:
                for name in waiting:
                    self._keep(name, {"error": over})
                return
            said = self._in_a_process(waiting, left)
            missing = [name for name in waiting if name not in self.figures]
            if missing:
                error = over if time.monotonic() >= self.ends else said
                self._keep(missing[0], {"error": error})

    def _in_a_process(self, names: list[str], left_s: float) -> str:
        """Keep what a process measures; return the end of what it printed besides."""
        command = [sys.executable, __file__, "--one", self.size, "--only", *names]
        path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
            )
            timer = threading.Timer(left_s, os.killpg, (process.pid, signal.SIGKILL))
            timer.start()
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith('{"variant"'):
                    found = json.loads(line)
                    self._keep(found.pop("variant"), found)
            process.wait()
            timer.cancel()
            log.seek(0)
            lines = log.read().strip().splitlines() or [f"exit status {process.returncode}"]
        return "\n".join(lines[-30:])

    def _keep(self, name: str | None, found: dict[str, Any]) -> None:
        if name is None:
            self.head = found
            return
        self.figures[name] = found
        print(f"{name}: {json.dumps(found)}", file=sys.stderr, flush=True)
        if self.out is not None:
            whole = {**self.head, "figures": self.figures, "ratios": ratios_of(self.figures)}
            self.out.write_text(json.dumps(whole, indent=1) + "\n")


def ratios_of(figures: Figures) -> dict[str, float]:
    """Return the ratios that figures give; memory is not measured on a CPU."""
    found = {}
    for name, (variant, base, figure) in RATIOS.items():
        mine, other = (figures.get(one, {}).get(figure) for one in (variant, base))
        if mine and other:
            found[name] = round(other / mine, 4)
    return found


def compare(figures: Figures, stored: dict[str, float]) -> tuple[str, list[str]]:
    """Return the table of ratios now and stored, and what is wrong, a line each."""
    now = ratios_of(figures)
    lines, wrong = [f"{'':34}{'now':>8}{'stored':>8}{'change':>9}"], []
    for name, (variant, base, _) in RATIOS.items():
        error = next((figures[v]["error"] for v in (variant, base) if "error" in figures[v]), None)
        kept = f"{stored[name]:.3f}" if name in stored else "none"
        if error is not None or (name in stored and name not in now):
            why = error or "not measured"
            lines.append(f"{name:34}{'':8}{kept:>8}  {why.splitlines()[-1][:90]}")
            wrong.append(f"{name} was not measured")
        elif name in now:
            change = now[name] / stored[name] - 1 if name in stored else None
            fell = change is not None and change < -MOST_FALL
            shown = "" if change is None else f"{change:+9.1%}"
            lines.append(f"{name:34}{now[name]:8.3f}{kept:>8}{shown}{'  fell' if fell else ''}")
            wrong += [f"{name} fell by {-100 * change:.1f} %"] if change and fell else []
    return "\n".join(lines), wrong


def main() -> None:
    """Measure, compare with what is stored, store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="full")
    parser.add_argument("--tiny", dest="size", action="store_const", const="tiny", help="a trial")
    parser.add_argument("--one", choices=list(SIZES), help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--most-s", type=float, help="seconds, 470 with --quick")
    parser.add_argument("--store", action="store_true", help="store the ratios for this GPU")
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write figures and ratios here as they come")
    chosen = parser.parse_args()
    if chosen.one:
        measure_here(chosen.only, SIZES[chosen.one])
        return
    run = Run(chosen.size, chosen.most_s or (3600 if chosen.size == "full" else 470), chosen.out)
    run.measure(chosen.only)
    file = chosen.results or ROOT / f"jobs/benchmarks/results/all_{chosen.size}.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    device = run.head.get("device", "")
    stored = kept.get("ratios", {}).get(device, {})
    measured = set(chosen.only)
    asked = {name for name, of in RATIOS.items() if {of.variant, of.base} <= measured}
    wanted = {name: value for name, value in stored.items() if name in asked}
    absent: Figures = {name: {} for name in VARIANTS}
    table, wrong = compare({**absent, **run.figures}, wanted)
    print(table)
    if chosen.store and not device:
        wrong.append("nothing was measured, and nothing is stored")
    elif chosen.store:
        ratios = {**kept.get("ratios", {}), device: {**stored, **ratios_of(run.figures)}}
        size = "" if chosen.size == "full" else f"--{chosen.size} "
        head = run.head | {"command": f"python jobs/benchmarks/all.py {size}--store"}
        file.write_text(
            json.dumps({**head, "ratios": ratios, "figures": run.figures}, indent=1) + "\n"
        )
    elif not wanted:
        wrong.append(f"nothing is stored for {device or 'no device'}: --store stores")
    if wrong:
        raise SystemExit("\n".join(["", *wrong]))


if __name__ == "__main__":
    main()
