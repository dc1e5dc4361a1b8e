"""Train a model for each target, and ask its engine what it computes of the exported folder.

    python -m tests.engines --vllm PYTHON --llamacpp PYTHON --executorch PYTHON

Each names an interpreter that has the engine; an engine without one is not asked, and that is
printed. `--model` and `--data` (Alpaca rows) take a real model; otherwise a tiny one is made. The
model before training, in bf16, is asked in the same engine, for its speed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from raytrain_adv import hardware
from raytrain_adv.config import load
from raytrain_adv.driver.commands.verify import Answer, ask
from raytrain_adv.errors import JobError
from raytrain_adv.export.model_folder import export_model
from raytrain_adv.export.reference import Agreement, agreement, read_reference, write_reference
from raytrain_adv.export.verify import most_divergence
from raytrain_adv.ops.fake_quant import gguf_file
from raytrain_adv.run.run import local_run
from raytrain_adv.worker.train import train
from tests.conftest import tiny_keys

TARGETS = {
    "vllm-w8a8-int8": ("vllm", "transformers"),
    "vllm-w4a16": ("vllm", "transformers"),
    "llamacpp-q8_0": ("llamacpp",),
    "llamacpp-q4_0": ("llamacpp",),
    "executorch-8da4w": ("executorch",),
}
"""Target -> the engines that are asked."""
KEYS = {
    "enable_qat": True,
    "bf16": True,
    "use_cpu": True,
    "save_strategy": "no",
    "val_size": 8,
    "logging_steps": 4,
    "disable_gradient_checkpointing": True,
}
SHAPES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
EXPERTS = {"num_experts_per_tok": 2, "norm_topk_prob": True, "moe_intermediate_size": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, **EXPERTS},
    "qwen3_moe": {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, **EXPERTS},
}
"""Tiny models by their model_type, and what a config.json has for them beside a Llama's keys."""
KINDS = (".safetensors", ".gguf", ".pte")
"""Files whose size is a folder's."""
CPU = ("cpu_name", "avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_int8")


@dataclass(frozen=True)
class Row:
    """What an engine computed of one folder."""

    target: str
    engine: str
    version: str
    agreement: Agreement
    tokens_per_s: float
    tokens_per_cpu_s: float
    gib: float
    steps: int
    """Of training, all of them rounded."""
    most: float
    """The divergence that is allowed."""

    @property
    def is_right(self) -> bool:
        """Whether it is the trained model."""
        return self.agreement.kl <= self.most


def main() -> int:
    """Return 1 if an engine computed another model than was trained, or did not answer."""
    options = parse()
    if options.train:
        return train_here(Path(options.train))
    pythons = {name: getattr(options, name) for name in ("vllm", "llamacpp", "executorch")}
    pythons["transformers"] = sys.executable
    rows: list[Row] = []
    errors: list[JobError] = []
    for target in options.targets.split(","):
        for row in asked(target, options, pythons):
            if isinstance(row, JobError):
                errors.append(row)
                print(f"{target}: {row.what}: {row.found.splitlines()[-1]}", flush=True)
                continue
            rows.append(row)
            print(describe(row), flush=True)
            write(options, rows)
    return 0 if rows and not errors and all(row.is_right for row in rows) else 1


def parse() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(prog="python -m tests.engines")
    for name in ("vllm", "llamacpp", "executorch"):
        parser.add_argument(f"--{name}", default="", metavar="PYTHON")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--family", choices=FAMILIES, default="llama", help="of the tiny model")
    parser.add_argument("--model", default="", metavar="FOLDER")
    parser.add_argument("--data", default="", metavar="FILE")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--work", default=tempfile.mkdtemp(prefix="engines_"), metavar="DIR")
    parser.add_argument("--out", default="", metavar="FILE")
    parser.add_argument("--train", default="", metavar="JOB", help=argparse.SUPPRESS)
    return parser.parse_args()


def asked(
    target: str, options: argparse.Namespace, pythons: dict[str, str]
) -> Iterator[Row | JobError]:
    """Train for a target unless that is done, and yield what each of its engines computes."""
    engines = [name for name in TARGETS[target] if pythons[name]]
    if missing := [name for name in TARGETS[target] if not pythons[name]]:
        print(f"{target}: not asked, as no interpreter is named: {', '.join(missing)}")
    if not engines:
        return
    out = Path(options.work) / target
    if not (out / "model-quantized").is_dir():
        job = Path(options.work) / f"{target}.yaml"
        job.parent.mkdir(parents=True, exist_ok=True)
        job.write_text(yaml.safe_dump(keys(target, options, out)))
        command = [sys.executable, "-m", "tests.engines", "--train", str(job)]
        subprocess.run(command, check=True)
    for engine in engines:
        try:
            yield compare(target, out / "model-quantized", engine, pythons[engine], options.steps)
            if engine != "executorch":  # it reads no folder
                folder = plain(out / "model")
                yield compare("bf16", folder, engine, pythons[engine], options.steps)
        except JobError as error:
            yield error


def keys(target: str, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Return the job's keys."""
    own = {**KEYS, "qat_target": target, "output_dir": str(out), "max_steps": options.steps}
    if not options.model:
        return {**tiny(out.with_name(f"{target}-made"), options.family), **own}
    data = Path(options.data)
    info = {"rows": {"file_name": str(data.absolute())}}
    (out.parent / "dataset_info.json").write_text(json.dumps(info))
    real = {"model_name_or_path": options.model, "stage": "sft", "finetuning_type": "full"}
    real |= {"dataset": "rows", "dataset_dir": str(out.parent), "cutoff_len": 256}
    real |= {"per_device_train_batch_size": 2, "learning_rate": 2e-5, "num_sample_answers": 0}
    return {**real, **own}


def tiny(folder: Path, family: str) -> dict[str, Any]:
    """Return keys that train a tiny model whose shapes engines take."""
    folder.mkdir()
    keys = tiny_keys(folder)
    file = Path(keys["model_name_or_path"]) / "config.json"
    own = {**SHAPES, "model_type": family, **FAMILIES[family]}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    return keys


def train_here(path: Path) -> int:
    """Train a job in this process, without Ray."""
    job = load(str(path))
    run = local_run(job)
    train(job, run, export_model)
    run.close()
    return 0


def plain(folder: Path) -> Path:
    """Return the trained model's folder with its own answers as the reference, and as GGUF."""
    known = read_reference(folder.with_name("model-quantized"))
    ids = torch.from_numpy(known["tokens"]).long().unsqueeze(0)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        write_reference(folder, ids, model(input_ids=ids).logits)
    if folder.with_name("model-quantized").joinpath(gguf_file.FILE).is_file():
        weights = load_file(folder / "model.safetensors")
        gguf_file.write(folder, folder, (gguf_file.Tensor(n, w, "") for n, w in weights.items()))
    return folder


def compare(target: str, folder: Path, engine: str, python: str, steps: int) -> Row:
    """Ask an engine about a folder."""
    found: Answer = ask(folder, engine, python)
    gib = sum(f.stat().st_size for f in folder.iterdir() if f.suffix in KINDS) / 2**30
    same = agreement(read_reference(folder), found.logprobs)
    speed = (found.tokens_per_s, found.tokens_per_cpu_s)
    return Row(target, engine, found.engine, same, *speed, gib, steps, most_divergence(folder))


def describe(row: Row) -> str:
    """Return a row in words."""
    same = row.agreement
    return (
        f"{row.target} in {row.version}: {'right' if row.is_right else 'ANOTHER MODEL'}, the same "
        f"token in {same.top1:.1%} of {same.num_tokens}, KL {same.kl:.2g}, "
        f"{row.tokens_per_s:.3g} tokens/s, {row.tokens_per_cpu_s:.3g} per processor second"
    )


def write(options: argparse.Namespace, rows: list[Row]) -> None:
    """Write the rows so far as JSON."""
    if options.out:
        facts = hardware.detect(torch.device("cpu"))
        model = Path(options.model).name or f"a tiny {options.family}"
        threads = os.environ.get("OMP_NUM_THREADS", "")
        trained = {"model": model, "steps": options.steps, "threads": threads}
        named = torch.cpu.get_capabilities()
        about = {"device": facts.describe(), "cpu": {name: named[name] for name in CPU}}
        arguments = f"--model {model} --data FILE --steps {options.steps}" if options.model else ""
        command = f"make test-engines ARGS='{arguments}'" if arguments else "make test-engines"
        made = {"date": str(date.today()), "command": command}
        result = {**made, **trained, **about, "rows": [asdict(row) for row in rows]}
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
