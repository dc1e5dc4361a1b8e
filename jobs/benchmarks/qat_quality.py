"""What QAT gains over quantizing afterward, by target: bf16, round-to-nearest, GPTQ, QAT, QAT with
distillation, and the delay of fake quantization.

    python jobs/benchmarks/qat_quality.py MODEL ALPACA.json --out FILE [--limit-s 420] [--quick]

Each training is a run of worker.train; rows are evaluated by worker.evaluation. The model learns
instructions (held-out loss) and function calls (share of held-out calls that are exact) at once.
GPTQ is llm-compressor's, calibrated on training rows of the same run. FILE is written after each
row, and another call with the same FILE and --work computes what is missing. What is computed is
printed every 15 seconds, and each row has where its seconds went; the stack of a row that has taken
five minutes is in its log in --work.

Trainings take a GPU in turn, so that more than --workers at a time gain nothing. GPTQ rounds a
column at a time, in Python: it runs on CPU cores beside them, and its result is evaluated on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import multiprocessing
import os
import random
import sys
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
TARGETS: dict[str, dict[str, Any]] = {
    "vllm-w4a16, groups of 64": {"qat_target": "vllm-w4a16", "qat_group_size": 64},
    "vllm-w8a8-int8": {"qat_target": "vllm-w8a8-int8"},
    "vllm-w4a16, per channel": {"qat_target": "vllm-w4a16", "qat_group_size": None},
    "llamacpp-q4_0": {"qat_target": "llamacpp-q4_0"},
    "executorch-8da4w, groups of 32": {"qat_target": "executorch-8da4w", "qat_group_size": 32},
}
DELAYED = "vllm-w4a16, groups of 64"
DELAYS = (0.25, 0.5, 0.75, 0.9)
"""Shares of the steps after which fake quantization begins."""
TEMPLATES = {"llama": "smollm2", "gemma3_text": "gemma"}
"""By model_type."""
BF16, RTN, GPTQ, QAT, DISTILLED = "bf16", "round-to-nearest", "GPTQ", "QAT", "QAT, distilled"
PACKAGES = ("torch", "transformers", "torchao", "triton", "llmcompressor", "compressed-tensors")


@dataclass(frozen=True)
class Task:
    """One row of the table."""

    method: str
    target: str
    seed: int
    delay: int = 0

    @property
    def name(self) -> str:
        """A folder's name."""
        parts = (self.method, self.target, f"{self.seed}", f"{self.delay}" if self.delay else "")
        return "-".join(filter(None, parts)).replace(", ", "_").replace(" ", "_")

    @property
    def twin(self) -> Task:
        """The run in bf16 that it is compared with."""
        return Task(BF16, "", self.seed)

    @property
    def needs_twin(self) -> bool:
        """Whether it starts from that run's model, or learns from it."""
        return self.method in (RTN, GPTQ, DISTILLED)


def tasks(options: argparse.Namespace) -> list[Task]:
    """Return all rows, target by target, and those of the delays last."""
    seeds = range(options.seeds)
    targets = [DELAYED] if options.delays_alone else options.targets
    methods = (QAT, RTN) if options.delays_alone else (GPTQ, DISTILLED, QAT, RTN)
    found = [Task(BF16, "", seed) for seed in seeds]
    found += [Task(m, target, seed) for target in targets for seed in seeds for m in methods]
    delays = dict.fromkeys(int(share * options.steps) for share in DELAYS)
    return found + [Task(QAT, DELAYED, seed, delay) for seed in seeds for delay in delays]


def main() -> None:
    """Compute the rows, several at a time, until the limit."""
    options = parse()
    began = time.monotonic()
    options.work.mkdir(parents=True, exist_ok=True)
    write_data(options)
    rows = rows_so_far(options)
    waiting = [task for task in tasks(options) if task.name not in rows]
    if waiting:
        prepare_data(waiting[0], options)
        tell(began, "data prepared")
    spawn = multiprocessing.get_context("spawn")
    pools = {
        calibrates: ProcessPoolExecutor(count, spawn, take_gpu, (spawn.Value("i", 0),))
        for calibrates, count in options.processes.items()
    }
    running: dict[Future[dict[str, Any]], Task] = {}
    while left := max(0.0, options.limit_s - (time.monotonic() - began)):
        for task in [t for t in waiting if not t.needs_twin or t.twin.name in rows]:
            calibrates = task.method == GPTQ
            beside = sum((other.method == GPTQ) == calibrates for other in running.values())
            if beside < options.processes[calibrates]:
                running[pools[calibrates].submit(row_of, task, options)] = task
                waiting.remove(task)
        if not running:
            break
        ended, _ = wait(running, min(left, 15.0), FIRST_COMPLETED)
        if not ended:
            tell(began, ", ".join(progress(task, options) for task in running.values()))
        for future in ended:
            task = running.pop(future)
            if isinstance(future.exception(), BrokenProcessPool):
                sys.exit(
                    f"a process ended by itself (see {task.name}.log): the same command goes on"
                )
            row = {"name": task.name, **asdict(task), **future.result()}
            if "error" not in row:
                rows[task.name] = row
                write(options, [*rows.values()])
            shown = {k: v for k, v in row.items() if k not in ("name", "method", "target")}
            tell(began, f"{task.name:48} {shown}")
    missing = [task.name for task in tasks(options) if task.name not in rows]
    print(f"{len(missing)} rows are missing: {', '.join(missing)}" if missing else "complete")
    for process in multiprocessing.active_children():
        process.terminate()
    sys.stdout.flush()
    os._exit(1 if missing else 0)  # what still runs has no rows to give


def tell(began: float, text: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"{time.monotonic() - began:5.0f} s  {text}", flush=True)


def rows_so_far(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the rows of another call by name, without bf16's whose model is needed and gone."""
    if not options.out.is_file():
        return {}
    known = json.loads(options.out.read_text())
    changed = [name for name, value in settings(options).items() if known[name] != value]
    if changed:
        sys.exit(f"{options.out} has rows of other {', '.join(changed)}: give another --out")
    rows = {row["name"]: row for row in known["rows"]}
    for task in tasks(options):
        model = options.work / task.twin.name / "model"
        if task.needs_twin and task.name not in rows and not model.is_dir():
            rows.pop(task.twin.name, None)
    return rows


def parse() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("data", type=Path, help="rows of instruction, input and output (JSON)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the rows")
    parser.add_argument("--work", type=Path, default=Path("saves/qat_quality"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate")
    parser.add_argument("--workers", type=int, default=2, help="rows at a time on each GPU")
    parser.add_argument("--calibration", type=int, default=128, help="rows that GPTQ reads")
    parser.add_argument("--delays-alone", action="store_true", help="only the delays, QAT and RTN")
    parser.add_argument("--limit-s", type=float, default=1e6, help="seconds after which to end")
    parser.add_argument("--quick", action="store_true", help="a trial on a CPU: few tokens")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.seeds, options.workers = 4, 1, 1
        options.calibration = 8
    from raytrain_adv.ops.fake_quant.targets import ARCHITECTURES

    options.work = options.work.absolute()
    options.model_type = json.loads((options.model / "config.json").read_text())["model_type"]
    options.targets = [*TARGETS]
    if options.model_type not in ARCHITECTURES:  # that are written as GGUF
        options.targets.remove("llamacpp-q4_0")
    options.rows, options.cutoff, options.held_out = (2, 96, 8) if options.quick else (16, 256, 200)
    options.cores = len(os.sched_getaffinity(0))
    trainers = options.workers * max(1, torch.cuda.device_count())
    options.processes = {False: trainers, True: max(1, options.cores // 4)}  # trains, calibrates
    return options


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what rows of one file share."""
    return {
        "model": options.model.name,
        "steps": options.steps,
        "learning_rate": options.rate,
        "batch": [options.rows, options.cutoff],
        "calibration_rows": options.calibration,
    }


def write_data(options: argparse.Namespace) -> None:
    """Write training and held-out rows of both datasets; no held-out question is trained on."""
    from jobs.data import make_tool_calls

    instructions = json.loads(options.data.read_text())
    random.Random(0).shuffle(instructions)
    draw, calls = random.Random(0), {}
    while len(calls) < 800 + options.held_out:
        row = make_tool_calls.row(draw)
        calls.setdefault(row["messages"][0]["content"], row)
    for name, rows in (("instructions", instructions), ("calls", list(calls.values()))):
        parts = {"held": rows[: options.held_out], "train": rows[options.held_out :]}
        for part, chosen in parts.items():
            file = options.work / f"{name}_{part}.json"
            text = json.dumps(chosen)
            if not file.is_file() or file.read_text() != text:
                file.write_text(text)


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the rows so far."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    about = {
        "date": str(date.today()),
        "command": f"python jobs/benchmarks/qat_quality.py {options.model.name} "
        f"{options.data.name} --out FILE --steps {options.steps} --seeds {options.seeds}",
        "device": device,
        "versions": {name: _version(name) for name in PACKAGES},
        **settings(options),
    }
    partial = options.out.with_suffix(".partial")
    partial.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    partial.replace(options.out)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def take_gpu(turn: Any) -> None:
    """Have this process compute on the next of the machine's GPUs."""
    with turn.get_lock():
        number, turn.value = turn.value, turn.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def row_of(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """Return a row's figures, or what failed; runs in a process of the pool."""
    torch.set_num_threads(max(1, options.cores // sum(options.processes.values())))
    start = time.perf_counter()
    log = options.work / f"{task.name}.log"
    try:
        with log.open("w") as file, contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(file))
            stack.enter_context(contextlib.redirect_stderr(file))
            faulthandler.dump_traceback_later(300, file=file)
            stack.callback(faulthandler.cancel_dump_traceback_later)
            found = trained(task, options) if task.method in (BF16, QAT, DISTILLED) else None
            found = found or quantized(task, options)
    except Exception as error:  # the other rows are still computed
        last = traceback.format_exc()[-1500:]
        found = {"error": f"{type(error).__name__}: {error}"[:500], "trace": last}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def prepare_data(task: Task, options: argparse.Namespace) -> None:
    """Tokenize the rows once, before processes would wait for each other."""
    from raytrain_adv.data.prepare import prepare

    prepare(load_job(task, options), lambda sentence: None)


def progress(task: Task, options: argparse.Namespace) -> str:
    """Return how far a row's training is, by its own metrics."""
    file = options.work / task.name / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    steps = [row for row in rows if row["kind"] == "train"]
    if steps:
        return f"{task.name} step {steps[-1]['step']}, {1e3 * steps[-1]['step_s']:.0f} ms"
    phases = [row["message"] for row in rows if row.get("event") == "phase"]
    return f"{task.name} {phases[-1] if phases else 'starts'}"


def keys_of(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """Return the job's keys."""
    work = options.work
    keys: dict[str, Any] = {
        "model_name_or_path": str(options.model.absolute()),
        "stage": "sft",
        "finetuning_type": "full",
        "bf16": True,
        "template": TEMPLATES[options.model_type],
        "dataset": [str(work / f"{name}_train.json") for name in ("instructions", "calls")],
        "eval_dataset": [str(work / f"{name}_held.json") for name in ("instructions", "calls")],
        "eval_on_each_dataset": True,
        "compute_accuracy": True,
        "cutoff_len": options.cutoff,
        "preprocessing_num_workers": 1,
        "per_device_train_batch_size": options.rows,
        "per_device_eval_batch_size": options.rows,
        "max_steps": options.steps,
        "learning_rate": options.rate,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.05,
        "disable_gradient_checkpointing": True,
        "use_cpu": not torch.cuda.is_available(),
        "torch_compile": torch.cuda.is_available(),
        "logging_steps": 10,
        "save_strategy": "no",
        "num_sample_answers": 0,
        "seed": task.seed,
        "export_model": task.method == BF16,
        "output_dir": str(work / task.name),
        "tokenized_path": str(work / "tokens"),
    }
    if task.target:
        keys |= {"enable_qat": True, **TARGETS[task.target]}
        keys |= {"fake_quant_after_n_steps": task.delay or None}
    if task.method == DISTILLED:
        teacher = str(work / task.twin.name / "model")
        keys |= {"use_distill_loss": True, "distill_model_name_or_path": teacher}
    return keys


def load_job(task: Task, options: argparse.Namespace) -> Any:
    """Return the job, from a file as users give it."""
    from raytrain_adv.config import load

    path = options.work / f"{task.name}.yaml"
    path.write_text(yaml.safe_dump(keys_of(task, options)))
    return load(str(path))


def trained(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """Train in this process, and return what the held-out rows give at the end."""
    from raytrain_adv.export.model_folder import export_model
    from raytrain_adv.run.run import local_run
    from raytrain_adv.worker.train import train

    job = load_job(task, options)
    run = local_run(job)
    try:
        result = train(job, run, export_model)
    finally:
        run.close()
    lines = (Path(job.output.output_dir) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    steps = [row for row in rows if row["kind"] == "train"]
    found = figures(next(row for row in reversed(rows) if row["kind"] == "eval"))
    phases = {name: round(seconds, 1) for name, seconds in result["timeline"].items()}
    spent = {"step_ms": 1e3 * steps[-1]["step_s"], "phases_s": phases}
    spent["cuda_graph"] = result["cuda_graph"]
    return {**found, "train_loss": steps[-1]["loss"], **spent}


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """Return the table's figures of an evaluation's."""

    def of(figure: str, dataset: str) -> float:
        keys = [k for k in result if k.startswith(f"{figure}/") and f"{dataset}_held" in k]
        return float(result[keys[0]])

    found = {"loss": of("loss", "instructions"), "calls_loss": of("loss", "calls")}
    return {**found, "exact_calls": of("exact_answers", "calls")}


def quantized(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """Round the twin's weights, by the package or by GPTQ, and evaluate them."""
    from gptq import calibrated, load_model

    from raytrain_adv.data.prepare import prepare
    from raytrain_adv.transforms.applied import Transforms

    job = load_job(task, options)
    device = torch.device("cpu" if job.parallel.use_cpu else "cuda")
    folder = options.work / task.twin.name / "model"
    prepared = prepare(job, print, rebuild=False)
    if task.method == GPTQ:
        model = calibrated(folder, job, prepared, options.calibration).to(device)
    else:
        model = load_model(folder).to(device)
        Transforms(job).prepare(model, None, options.rows * options.cutoff)
    return evaluate(model, job, prepared, device)


def evaluate(model: Any, job: Any, prepared: Any, device: torch.device) -> dict[str, Any]:
    """Return what the held-out rows give, by the evaluation of training."""
    from raytrain_adv.data.tokens.tokenizer import load_tokenizer
    from raytrain_adv.run.run import local_run
    from raytrain_adv.run.schedule import resolve_arithmetic
    from raytrain_adv.worker import evaluation
    from raytrain_adv.worker.train import batches_of

    run = local_run(job, device)
    arithmetic = resolve_arithmetic(job, len(prepared.train), 1)
    tokenizer = load_tokenizer(job)
    parts = batches_of(job, run, model, prepared, tokenizer, arithmetic, "positions")
    meter = SimpleNamespace(paused=lambda what: contextlib.nullcontext())
    state: Any = SimpleNamespace(model=model, run=run, job=job, meter=meter, eval_loss_sum=None)
    result = {}
    for name, rows in parts[2].items():
        found = evaluation.evaluate(state, rows)
        result |= {f"{figure}/{name}": value for figure, value in found.items()}
    return figures(result)


if __name__ == "__main__":
    main()
