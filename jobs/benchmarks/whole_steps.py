"""What the scripts here share: a model on this device with a job's transforms, and its steps."""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from raytrain_adv import hardware
from raytrain_adv.config import JobConfig, load
from raytrain_adv.estimate.memory import predict
from raytrain_adv.model import parallel, weights
from raytrain_adv.model.build import build
from raytrain_adv.ops.loss.function import loss_function
from raytrain_adv.run.run import local_run
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.worker.checks.step import clip
from raytrain_adv.worker.install import fetch, install
from raytrain_adv.worker.optim import build_optimizer
from raytrain_adv.worker.trials.collectives import choose

ROOT = Path(__file__).parents[2]
SHAPE = ROOT / "jobs/models/llama3-8b-shape"
GIB = 2**30
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def job_of(changed: dict[str, int], shape: Path = SHAPE, **keys: Any) -> JobConfig:
    """Return a job on a shape, random weights and all states in bf16.

    Args:
        changed: keys of the shape's config that are to be others, to try a script out.
        shape: the folder of a config.json; the 8B shape.
        keys: of the job.
    """
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    config = json.loads((shape / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    full = keys.get("finetuning_type", "full") == "full"
    values = {
        "model_name_or_path": str(folder),
        "train_from_scratch": full,
        "finetuning_type": "full",
        "pure_bf16": full,
        "bf16": not full,  # adapters are trained in float32, on a model in bf16
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
        transforms = Transforms(job)
        transforms.check(facts)
        run = local_run(job, DEVICE)
        fetch(job, facts, print)
        model = build(_from_scratch(job))
        plans = install(run, transforms, model, transforms.prepare(model, facts))
        mesh = parallel.build_mesh(job, DEVICE)
        parallel.shard(model, job, mesh, choose(job, run, mesh)[0])
        weights.materialize(model, DEVICE)
        weights.init_from_scratch(model, _from_scratch(job), DEVICE)
        transforms.initialize(model, plans, job.train.seed)
        transforms.after_step(model)
        return cls(job, model, build_optimizer(model, job))

    def predicted_gib(self, tokens: int, workers: int = 1) -> float:
        """Return the peak that the plan would predict; no CUDA graph records the steps here."""
        planned = build(_from_scratch(self.job))
        Transforms(self.job).prepare(planned)
        parallel = self.job.parallel.model_copy(update={"cuda_graph": False})
        return predict(planned, replace(self.job, parallel=parallel), workers, tokens, 1).total

    def stepper(self, tokens: int, document: int | None = None) -> Callable[[], float]:
        """Return what does one step on a sequence of that length and gives its loss per token; with
        documents of so many tokens packed in it, if they are given.
        """
        loss_sum = loss_function(self.model, self.job.parallel.torch_compile)
        vocab, transforms = self.model.config.vocab_size, Transforms(self.job)
        torch.manual_seed(0)
        ids = torch.randint(0, vocab, (1, tokens + 1), device=DEVICE)
        inputs, labels = {"input_ids": ids[:, :-1].contiguous()}, ids[:, 1:].contiguous()
        if document is not None:
            inputs |= packed(tokens, document)

        def step() -> float:
            loss = loss_sum(self.model, inputs, labels)
            (loss * (1 / tokens)).backward()
            clip(self.optimizer, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            transforms.after_step(self.model)
            return loss.item() / tokens

        return step


def packed(tokens: int, document: int) -> dict[str, Any]:
    """Return what a model gets besides token ids, of documents of equal length in one row."""
    starts = torch.arange(0, tokens + 1, document, dtype=torch.int32, device=DEVICE)
    return {
        "position_ids": torch.arange(tokens, device=DEVICE)[None] % document,
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), starts),
        **dict.fromkeys(("max_length_q", "max_length_k"), document),
    }


def _from_scratch(job: JobConfig) -> JobConfig:
    """Return the job that builds the model: one that trains adapters would look for weights."""
    model = job.model.model_copy(update={"train_from_scratch": True})
    return replace(job, model=model)


def compare(text: str, variants: dict[str, dict[str, Any]], base: dict[str, Any]) -> None:
    """Measure each variant as the command line says, print a table, write the results.

    Args:
        text: the script's own, for --help.
        variants: name -> job keys; the first is what the others are held against.
        base: keys of all of them, unless a variant says otherwise.
    """
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", default="", help="name -> job keys, as JSON")
    parser.add_argument("--only", nargs="*", default=[], help="names of the variants to measure")
    parser.add_argument("--loss-kernel", default="chunked")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=6, help="measured, after three")
    parser.add_argument("--shape", default="{}", help="config keys to change, as JSON, for a trial")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    chosen = parser.parse_args()
    variants = json.loads(chosen.variants) if chosen.variants else variants
    variants = {name: variants[name] for name in chosen.only or variants}
    figures: dict[str, dict[str, Any]] = {}
    for name, keys in variants.items():
        shared = {**base, "loss_kernel": chosen.loss_kernel}
        model = Whole.of(job_of(json.loads(chosen.shape), **{**shared, **keys}))
        result = measured(model.stepper(chosen.tokens), chosen.steps, warm_up=3)
        figures[name] = {**result, "tokens_per_second": chosen.tokens / result["seconds"]}
        print(name, json.dumps(figures[name]), file=sys.stderr, flush=True)
        del model
        free()
    if chosen.out is not None:
        results = head_of_results(" ".join(["python", *sys.argv]))
        results |= {"tokens": chosen.tokens, "variants": variants, "figures": figures}
        chosen.out.write_text(json.dumps(results, indent=1) + "\n")
    base_s = next(iter(figures.values()))["seconds"]
    for name, result in figures.items():
        speed = f"{1e3 * result['seconds']:8.1f} ms  {base_s / result['seconds']:6.3f} x"
        tokens = f"{result['tokens_per_second']:9,.0f} tokens/s"
        print(f"{name:<28} {speed}  {tokens}  {result['peak_gib']:6.2f} GiB")


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
