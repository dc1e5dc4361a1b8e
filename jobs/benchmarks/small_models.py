"""Steps of small models on one GPU, by the whole training loop: launches, not arithmetic, cost.

    python jobs/benchmarks/small_models.py [--only NAME ...] [--tokens 2048] [--kernels] [--out F]

Each variant is a run of worker.train in a process of its own, on rows of Python's documentation,
with random weights. The floor is the arithmetic at the GPU's dense bf16 peak.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

ROOT = Path(__file__).parents[2]
SMOL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "head_dim": 64}
SMOL |= {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}
QWEN = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128}
QWEN |= {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151936}
SHAPES = {
    "135m": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SMOL},
    "0.6b": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **QWEN},
}
LORA = {"finetuning_type": "lora", "lora_rank": 16, "lora_target": "all"}
QAT = {"enable_qat": True, "qat_weight_dtype": "int4"}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "135m pure_bf16": ("135m", {"pure_bf16": True}),
    "135m pure_bf16, no graph": ("135m", {"pure_bf16": True, "cuda_graph": False}),
    "135m bf16": ("135m", {"bf16": True}),
    "135m bf16, no graph": ("135m", {"bf16": True, "cuda_graph": False}),
    "135m bf16, QAT": ("135m", {"bf16": True, **QAT}),
    "135m bf16, LoRA": ("135m", {"bf16": True, **LORA}),
    "135m bf16, LoRA, QAT": ("135m", {"bf16": True, **LORA, **QAT}),
    "0.6b pure_bf16": ("0.6b", {"pure_bf16": True}),
    "0.6b bf16": ("0.6b", {"bf16": True}),
    "0.6b bf16, QAT": ("0.6b", {"bf16": True, **QAT}),
    "0.6b bf16, LoRA": ("0.6b", {"bf16": True, **LORA}),
}


def run(shape: str, keys: dict[str, Any], tokens: int, steps: int, kernels: bool) -> dict[str, Any]:
    """Return what a run of these keys reports."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in (ROOT / "jobs/models/tiny-llama").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = {"tie_word_embeddings": True, "max_position_embeddings": 131072, **SHAPES[shape]}
        (folder / "config.json").write_text(json.dumps(config))
        if keys.get("finetuning_type") == "lora":
            kind = transformers.AutoConfig.from_pretrained(folder)
            transformers.AutoModelForCausalLM.from_config(kind).save_pretrained(folder)
        job = {
            "model_name_or_path": str(folder),
            "train_from_scratch": keys.get("finetuning_type") != "lora",
            "stage": "sft",
            "finetuning_type": "full",
            "dataset": "python_stdlib_docs",
            "dataset_dir": str(ROOT / "jobs/data"),
            "cutoff_len": 2048,
            "packing": True,
            "per_device_train_batch_size": tokens // 2048,
            "disable_gradient_checkpointing": True,
            "torch_compile": torch.cuda.is_available(),
            "max_steps": steps,
            "logging_steps": 5,
            "save_strategy": "no",
            "num_sample_answers": 0,
            "learning_rate": 1e-4,
            "output_dir": str(folder / "out"),
            **keys,
        }
        (folder / "job.yaml").write_text(yaml.safe_dump(job))
        command = [sys.executable, __file__, "--job", str(folder / "job.yaml")]
        command += ["--kernels"] if kernels else []
        environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getpid() % 1000)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            return {"error": done.stderr[-1500:]}
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found


def kernels_of(profile: Any, steps: int) -> list[tuple[str, int, float]]:
    """Return the kernels of a profile: name, launches and milliseconds per step."""
    found = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    found.sort(key=lambda event: -event.self_device_time_total)
    return [(e.key[:90], e.count // steps, e.self_device_time_total / steps / 1e3) for e in found]


@contextlib.contextmanager
def profiled(first: int, steps: int, found: list[Any]) -> Iterator[None]:
    """Profile the passes from number `first` on, into `found`; one pass is one step here."""
    from raytrain_adv.worker.graph import Passes

    plain, count = Passes.__call__, 0
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def call(self: Any, *given: Any) -> Any:
        nonlocal count
        count += 1
        if count in (first, first + steps):
            torch.cuda.synchronize()
            (profile.start if count == first else profile.stop)()
        return plain(self, *given)

    Passes.__call__ = call  # type: ignore[method-assign]
    yield
    Passes.__call__ = plain  # type: ignore[method-assign]
    found.extend(kernels_of(profile, steps))


def train_here(path: str, kernels: bool) -> None:
    """Train a job in this process; print its figures as JSON."""
    from raytrain_adv.config import load
    from raytrain_adv.run.run import local_run
    from raytrain_adv.worker.train import train

    def nothing(*_: Any, **__: Any) -> Any:
        raise SystemExit

    job = load(Path(path))
    found: list[Any] = []
    watched = profiled(15, 5, found) if kernels else contextlib.nullcontext()
    with watched, contextlib.suppress(SystemExit):
        train(job, local_run(job), nothing)
    rows = map(json.loads, (Path(job.output.output_dir) / "metrics.jsonl").read_text().splitlines())
    kept = list(rows)
    logged = [row for row in kept if row["kind"] == "train"]
    seconds = [row["step_s"] for row in logged[-4:]]
    print(
        json.dumps(
            {
                "ms": 1e3 * sorted(seconds)[len(seconds) // 2],
                "losses": [row["loss"] for row in logged],
                "norms": [row["grad_norm"] for row in logged],
                "peak_gib": logged[-1]["peak_memory_gib"],
                "mfu": logged[-1]["mfu_bf16"],
                "kernels": found,
                "said": [row["message"] for row in kept if row.get("event") == "cuda_graph"],
            }
        )
    )


def main() -> None:
    """Measure the variants in turn and print a line of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--kernels", action="store_true", help="list the kernels of a step")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    chosen = parser.parse_args()
    if chosen.job:
        train_here(chosen.job, chosen.kernels)
        return
    figures: dict[str, Any] = {}
    for tokens in chosen.tokens:
        for name in chosen.only:
            found = figures[f"{name}, {tokens} tokens"] = run(
                *VARIANTS[name], tokens, chosen.steps, chosen.kernels
            )
            print(f"{name:28} {tokens:6}", json.dumps(found), flush=True)
            if chosen.out is not None:
                whole = {"command": " ".join(sys.argv), "figures": figures}
                chosen.out.write_text(json.dumps(whole))


if __name__ == "__main__":
    main()
