"""Bytes that FSDP2 gathers per step in bf16 and in FP8, counted; what that means, computed.

    python jobs/benchmarks/fp8_all_gather.py [--out FILE]

Counts on two CPU processes what a forward and backward pass gathers for a model of the 8B shape's
proportions, scales that to the 8B shape, and computes the time of a step on 8 and 64 GPUs from the
step measured on one H200 and stated bandwidths. Nothing about more than one GPU is measured here.
"""

import argparse
import json
import os
import socket
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml

ROOT = Path(__file__).parents[2]
SHRUNK = {
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 512,
}
"""The 8B shape divided by 64 in width, by 8 in depth."""
COMPUTE_S = {"bf16": 0.7427, "fp8": 0.5614}
"""Step of the 8B shape on one H200, 8,192 tokens: results/llama3_8b_fp8.json."""
LINKS = {
    8: ("one node, NVLink: 450 GB/s a direction by the H100 datasheet, 80 % of it", 0.8 * 450e9),
    64: ("8 nodes, one 400 Gb/s InfiniBand port per GPU, 80 % of it", 0.8 * 50e9 * 8),
}
"""GPUs -> what the bytes travel over, and bytes/s into one GPU (over 8 nodes: into a node)."""


@dataclass
class Gathered:
    """Bytes that come out of all gathers of one forward and backward pass."""

    total: int = 0


def count(rank: int, port: int, keys: dict[str, object], answer: "mp.SimpleQueue[int]") -> None:
    """Run one pass on this rank; rank 0 answers with the bytes gathered."""
    from raytrain_adv.config import load
    from raytrain_adv.model import parallel, weights
    from raytrain_adv.model.build import build
    from raytrain_adv.transforms.applied import Transforms

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads((ROOT / "jobs/models/llama3-8b-shape/config.json").read_text())
        Path(folder, "config.json").write_text(json.dumps({**config, **SHRUNK}))
        path = Path(folder, "job.yaml")
        path.write_text(yaml.safe_dump({**keys, "model_name_or_path": folder}))
        job = load(path)
        model = build(job)
        Transforms(job).prepare(model)
        parallel.shard(model, job, parallel.build_mesh(job, torch.device("cpu")))
        weights.materialize(model, torch.device("cpu"))
        weights.init_from_scratch(model, job, torch.device("cpu"))
    seen = Gathered()
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    gather = getattr(dist, name)  # FSDP2 calls the first from torch 2.13 on

    def counting(output_tensor: torch.Tensor, *args: object, **options: object) -> object:
        seen.total += output_tensor.numel() * output_tensor.element_size()
        return gather(output_tensor, *args, **options)

    setattr(dist, name, counting)
    ids = torch.arange(64)[None] % SHRUNK["vocab_size"]
    model(input_ids=ids, use_cache=False).logits.float().sum().backward()
    if rank == 0:
        answer.put(seen.total)
    dist.destroy_process_group()


def counted(fp8: bool) -> int:
    """Return the bytes of one pass on two processes."""
    keys = {
        "train_from_scratch": True,
        "finetuning_type": "full",
        "pure_bf16": True,
        "dataset": "none.json",
        "output_dir": "none",
        "disable_gradient_checkpointing": True,
    }
    if fp8:
        keys |= {"fp8": True, "fp8_min_features": 16, "fp8_enable_fsdp_float8_all_gather": True}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    answer = context.SimpleQueue()
    mp.spawn(count, (port, keys, answer), nprocs=2)
    return answer.get()


def sizes(config: dict[str, int]) -> tuple[int, int]:
    """Return the parameters of the linears in the layers, and all others."""
    hidden, inner, layers = (
        config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    query = hidden * head * config["num_attention_heads"]
    key_value = hidden * head * config["num_key_value_heads"]
    linears = layers * (2 * query + 2 * key_value + 3 * hidden * inner)
    others = 2 * config["vocab_size"] * hidden + (2 * layers + 1) * hidden
    return linears, others


def expected(linears: int, others: int, fp8: bool) -> int:
    """Return the bytes of a pass: everything is gathered for forward and again for backward, the
    linears of the layers in one byte each with FP8.
    """
    return 2 * (linears * (1 if fp8 else 2) + 2 * others)


def at_scale(num_gpus: int, linears: int, others: int) -> dict[str, object]:
    """Compute a step's time where communication hides behind nothing, and behind everything."""
    link, rate = LINKS[num_gpus]
    # Over 8 nodes each node takes in 7/8 of the bytes, in one node each GPU does.
    share = 7 / 8
    reduced = 4 * (linears + others)  # gradients are reduced in float32
    seconds = {
        name: share * (expected(linears, others, name == "fp8") + reduced) / rate
        for name in COMPUTE_S
    }
    hidden = {name: max(COMPUTE_S[name], seconds[name]) for name in COMPUTE_S}
    exposed = {name: COMPUTE_S[name] + seconds[name] for name in COMPUTE_S}
    return {
        "computed": True,
        "link": link,
        "communication_s": {name: round(s, 4) for name, s in seconds.items()},
        "speedup_if_all_of_it_is_hidden": round(hidden["bf16"] / hidden["fp8"], 3),
        "speedup_if_none_of_it_is_hidden": round(exposed["bf16"] / exposed["fp8"], 3),
    }


def main() -> None:
    """Count, scale, compute, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    out = parser.parse_args().out
    counts = {"bf16": counted(False), "fp8": counted(True)}
    for name, number in counts.items():
        if number != expected(*sizes(SHRUNK), fp8=name == "fp8"):
            raise SystemExit(f"{name}: {number} bytes were gathered, not what the sizes give")
    config = json.loads((ROOT / "jobs/models/llama3-8b-shape/config.json").read_text())
    whole = sizes(config)
    figures = {
        "date": str(date.today()),
        "command": "python jobs/benchmarks/fp8_all_gather.py --out FILE",
        "counted_bytes_of_a_pass_of_the_shrunk_shape": counts,
        "gathered_gb_per_pass_of_the_8b_shape": {
            name: round(expected(*whole, fp8=name == "fp8") / 1e9, 2) for name in COMPUTE_S
        },
        "reduced_gb_per_step_of_the_8b_shape": round(4 * sum(whole) / 1e9, 2),
        "measured_step_s_on_one_h200": COMPUTE_S,
        "computed": {str(n): at_scale(n, *whole) for n in LINKS},
    }
    text = json.dumps(figures, indent=1)
    print(text)
    if out is not None:
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()
