"""What the scripts here share: a model on this device with a job's transforms, and its steps."""

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from raytrain_adv import hardware
from raytrain_adv.config import JobConfig, load
from raytrain_adv.transforms.apply import enabled, prepare_all
from raytrain_adv.worker import parallel, weights
from raytrain_adv.worker.gradients import clip
from raytrain_adv.worker.install import fetched, installed
from raytrain_adv.worker.loss import loss_function
from raytrain_adv.worker.memory import predict
from raytrain_adv.worker.model import build
from raytrain_adv.worker.optim import build_optimizer
from raytrain_adv.worker.run import local_run

ROOT = Path(__file__).parents[2]
SHAPE = ROOT / "jobs/models/llama3-8b-shape"
GIB = 2**30
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def job_of(changed: dict[str, int], **keys: Any) -> JobConfig:
    """Return a job on the 8B shape, random weights and all states in bf16.

    Args:
        changed: keys of the shape's config that are to be others, to try a script out.
        keys: of the job.
    """
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    config = json.loads((SHAPE / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    values = {
        "model_name_or_path": str(folder),
        "train_from_scratch": True,
        "finetuning_type": "full",
        "pure_bf16": True,
        "torch_compile": DEVICE.type == "cuda",
        "disable_gradient_checkpointing": True,
        "per_device_train_batch_size": 1,
        "dataset": "none.json",
        "output_dir": str(folder / "out"),
        **keys,
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(values))
    return load(folder / "job.yaml")


@dataclass
class Whole:
    """A model and its optimizer, ready for steps."""

    job: JobConfig
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, job: JobConfig) -> "Whole":
        """Build the job's model with its transforms, on this device, its weights random."""
        torch._dynamo.reset()
        facts = hardware.detect(DEVICE)
        for transform in enabled(job):
            transform.check(facts)
        run = local_run(job, DEVICE)
        fetched(job, run, facts)
        model = build(job)
        installed(job, run, model, prepare_all(job, model, facts))
        parallel.shard(model, job, None)
        weights.materialize(model, DEVICE)
        weights.init_from_scratch(model, job, DEVICE)
        return cls(job, model, build_optimizer(model, job))

    def predicted_gib(self, tokens: int) -> float:
        """Return the peak that the plan would predict."""
        return predict(self.model, self.job, 1, tokens, 1).total

    def stepper(self, tokens: int) -> Callable[[], float]:
        """Return what does one step on a sequence of that length and gives its loss per token."""
        loss_sum = loss_function(self.model, self.job.parallel.torch_compile)
        vocab = self.model.config.vocab_size
        torch.manual_seed(0)
        ids = torch.randint(0, vocab, (1, tokens + 1), device=DEVICE)
        inputs, labels = {"input_ids": ids[:, :-1].contiguous()}, ids[:, 1:].contiguous()

        def step() -> float:
            loss = loss_sum(self.model, inputs, labels)
            (loss * (1 / tokens)).backward()
            clip(self.optimizer, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            return loss.item() / tokens

        return step


def measured(do: Callable[[], object], steps: int, warm_up: int) -> dict[str, float]:
    """Return the median seconds of a call after warm-up, and the peak memory over all of them."""
    for _ in range(warm_up):
        do()
    reset_peak()
    seconds = []
    for _ in range(steps):
        seconds.append(timed(do))
    return {"seconds": statistics.median(seconds), "peak_gib": peak_gib()}


def timed(do: Callable[[], object]) -> float:
    """Return the seconds of one call, the GPU's work included."""
    wait()
    start = time.perf_counter()
    do()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    """Wait for the GPU."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def free() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak() -> None:
    """Measure peak memory from here on."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """Return the peak of allocated GPU memory; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() / GIB if DEVICE.type == "cuda" else 0.0


def held_gib() -> float:
    """Return the GPU memory that is allocated now; 0 on a CPU."""
    return torch.cuda.memory_allocated() / GIB if DEVICE.type == "cuda" else 0.0


def head_of_results(command: str) -> dict[str, Any]:
    """Return what every file of results begins with."""
    facts = hardware.detect(DEVICE)
    return {
        "date": str(date.today()),
        "command": command,
        "device": facts.device_name,
        "versions": {name: v for name, v in facts.versions.items() if v is not None},
    }
