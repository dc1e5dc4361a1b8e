"""What an asynchronous checkpoint costs the steps: 8B shape, one GPU, the optimizer's states too.

    python jobs/benchmarks/checkpoint_delay.py [--shape FOLDER] [--folder FOLDER] [--out FILE]
    python jobs/benchmarks/checkpoint_delay.py --commit 4      what a commit of 4 GiB takes here

--commit trains nothing: it saves so many GiB, from a GPU if there is one, and in turn writes and
syncs as many bytes with as many threads, which is what the disk permits.

Otherwise trains without Ray. At step 11 the state is copied to host memory that is new, and at step
12 as for a checkpoint, to memory that was taken before and locked; both are timed and thrown away.
Step 13 is followed by a checkpoint, of which training waits for the copy. Then steps go on until it
is written, or for 60 of them. `delay_s` is what the checkpoint has cost until then: the wait, and
by how much steps were longer than those before it. FOLDER must have room for one checkpoint (45 GiB
for the 8B shape).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from whole_steps import DEVICE, ROOT, SHAPE, head_of_results, job_of

from raytrain_adv.checkpoint.folders import Progress
from raytrain_adv.checkpoint.save import CheckpointWriter, training_state
from raytrain_adv.checkpoint.staging import HostMemory, num_threads, stage
from raytrain_adv.config import load
from raytrain_adv.run.run import local_run
from raytrain_adv.worker import train as line
from raytrain_adv.worker.checks.step import Checks
from raytrain_adv.worker.loop import TrainState
from raytrain_adv.worker.train import train

DRY_AT, SAVED_AT, MOST = 12, 13, 60
WARM_UP = 4
INTERVAL = 50
"""Steps between checkpoints, by which the share is stated."""


class Measured:
    """Times what the loop does, from outside."""

    def __init__(self, out: Path | None, folder: Path) -> None:
        self.out, self.folder = out, folder
        self.seconds: dict[str, list[float]] = {"before": [], "while it is written": []}
        self.copies: dict[str, float] = {}
        self.began = 0.0

    def patch(self) -> None:
        """Have the loop's steps and saves timed."""
        step, save = line.train_step, CheckpointWriter.save

        def timed_step(state: TrainState, checks: Checks, number: int) -> None:
            start = time.perf_counter()
            step(state, checks, number)
            state.meter._synchronize()
            kind = "before" if number < SAVED_AT else "while it is written"
            if number >= WARM_UP:
                self.seconds[kind].append(time.perf_counter() - start)

        def timed_save(writer: CheckpointWriter, progress: Any, metrics: dict[str, float]) -> None:
            start = time.perf_counter()
            if progress.step == DRY_AT - 1:
                stage(training_state(writer.model, writer.optimizer), HostMemory(print))
                self.copies["to memory that is new and not locked"] = time.perf_counter() - start
            elif progress.step == DRY_AT:
                stage(training_state(writer.model, writer.optimizer), writer.memory)
                self.copies["to locked memory"] = time.perf_counter() - start
            elif progress.step == SAVED_AT:
                save(writer, progress, metrics)
                self.copies["checkpoint"] = time.perf_counter() - start
                self.began = time.perf_counter()
            elif writer.pending is not None and (
                writer.pending[2].done() or progress.step >= SAVED_AT + MOST
            ):
                self.end(writer)

        line.train_step = timed_step
        CheckpointWriter.save = timed_save  # type: ignore[method-assign]
        CheckpointWriter.poll = lambda writer: (  # type: ignore[method-assign]
            writer.memory.is_prepared or prepare(writer)
        )

    def end(self, writer: CheckpointWriter) -> NoReturn:
        """Print and write the figures, and end the process: nothing else is of interest."""
        assert writer.pending is not None
        step_s = statistics.median(self.seconds["before"])
        during = self.seconds["while it is written"]
        slower = sum(seconds - step_s for seconds in during)
        delay = self.copies["checkpoint"] + slower
        files = [f for f in self.folder.rglob("*.distcp") if f.is_file()]
        figures = {
            "step_s": step_s,
            "copy_s": self.copies,
            "step_while_written_s": statistics.median(during),
            "num_steps_while_written": len(during),
            "written": writer.pending[2].done(),
            "written_s": time.perf_counter() - self.began,
            "gib": sum(f.stat().st_size for f in files) / 2**30,
            "delay_s": delay,
            "share_of_50_steps": delay / (INTERVAL * step_s),
            "next_step_share_of_50_steps": self.copies["checkpoint"] / (INTERVAL * step_s),
        }
        results = head_of_results("python jobs/benchmarks/checkpoint_delay.py") | figures
        print(json.dumps(results, indent=1), flush=True)
        if self.out is not None:
            self.out.write_text(json.dumps(results, indent=1) + "\n")
        shutil.rmtree(self.folder, ignore_errors=True)
        os._exit(0)


def prepare(writer: CheckpointWriter) -> None:
    """Take the memory, as the writer's own poll does after the first step."""
    from raytrain_adv.checkpoint.staging import tensors_of

    writer.memory.prepare(tensors_of(training_state(writer.model, writer.optimizer)))


def commits(gib: float, folder: Path, rounds: int = 3) -> dict[str, Any]:
    """Return the seconds of commits of a model of that size, and of its bytes written plainly."""
    parts = max(1, round(gib * 16))
    weights = [torch.randn(2**24, device=DEVICE) for _ in range(parts)]  # 64 MiB each
    plain = [weight.cpu().numpy() for weight in weights]
    model = torch.nn.ParameterList(weights)
    job = job_of({}, output_dir=str(folder), save_only_model=True, save_total_limit=1)
    writer = CheckpointWriter(job, local_run(job, DEVICE), model, torch.optim.SGD(model))
    writer.poll()  # takes the memory for copies, as after the first step
    threads = num_threads()

    def write(number: int) -> None:
        with (folder / f"plain_{number}").open("wb", buffering=0) as file:
            for part in plain[number::threads]:
                file.write(part)
            os.fsync(file.fileno())

    seconds: dict[str, list[float]] = {"training_waits_s": [], "disk_s": []}
    for step in range(rounds):
        start = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(write, range(threads)))
        seconds["disk_s"].append(time.perf_counter() - start)
        for file in folder.glob("plain_*"):
            file.unlink()
        start = time.perf_counter()
        writer.save(Progress(step + 1, 1, 1, 0, 0.0, 0.0), {})
        seconds["training_waits_s"].append(time.perf_counter() - start)
        writer.finish()
    seconds["committed_s"] = writer.took_s
    writer.close()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["committed_s"] / medians["disk_s"]
    return {"gib": parts / 16, "threads": threads, **medians, "of_the_disk": ratio, "all": seconds}


def main() -> None:
    """Run the one training, or the commits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=Path, default=SHAPE)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--commit", type=float, metavar="GIB")
    parser.add_argument("--out", type=Path)
    parser.add_argument("keys", nargs="*", help="of the job, as key=value")
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-delay-", dir=chosen.folder))
    if chosen.commit:
        results = head_of_results(
            f"python jobs/benchmarks/checkpoint_delay.py --commit {chosen.commit:g}"
        )
        results |= commits(chosen.commit, folder)
        print(json.dumps(results, indent=1))
        if chosen.out is not None:
            chosen.out.write_text(json.dumps(results, indent=1) + "\n")
        shutil.rmtree(folder)
        return
    keys = yaml.safe_load((ROOT / "jobs/benchmarks/llama3_8b_bf16.yaml").read_text())
    keys |= {
        "model_name_or_path": str(chosen.shape.absolute()),
        "dataset_dir": str(ROOT / "jobs/data"),
        "disable_gradient_checkpointing": False,
        "gradient_checkpointing": "full",
        "output_dir": str(folder),
        "logging_steps": 1,
        "max_steps": 1000,
        "save_strategy": "steps",
        "save_steps": 1,
        "export_model": False,
    }
    job_file = Path(tempfile.mkdtemp()) / "job.yaml"
    job_file.write_text(yaml.safe_dump(keys))
    job = load(str(job_file), chosen.keys)
    Measured(chosen.out, folder).patch()
    train(job, local_run(job), lambda *_: None)  # type: ignore[arg-type, return-value]


if __name__ == "__main__":
    main()
