"""The longest sequence that one GPU trains: 8B shape, full activation checkpointing.

    python jobs/benchmarks/longest_sequence.py [--out jobs/benchmarks/results/longest_sequence.json]
    ... --lengths 131072,163840 --optim adamw_torch_8bit
    ... --eager --liger            what the HF Trainer computes below
    ... --plan                     what the plan predicts for each length; no GPU
    ... --long                     tiled_mlp, activation_offloading and kept attention
    ... --long --lengths 524288 --offload 27 --documents 4096 \\
        --attention hub:./jobs/kernels/torch_flash    packed documents: attention costs little
    ... --long --lengths 524288 --layers 2 --offload 1     full attention, of two layers

Lengths are tried in their order until memory runs out. Two short steps come first: they make the
optimizer's states, and graphs that take any length. Each length trains two steps: `seconds` are
the second one's. `compiled_anew` is how many graphs the length needed all the same (why is
printed), and `first_seconds` what the step took in which they were made.
The same on the HF Trainer with Liger, a process per length:

    python jobs/benchmarks/hf_trainer.py --liger --checkpointing --eager --warm-up 1 \\
        --warm-up-tokens 2048 --steps 1 --tokens 131072
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from whole_steps import Whole, free, head_of_results, job_of, peak_gib, reset_peak, timed

from raytrain_adv.config import JobConfig
from raytrain_adv.estimate.memory import predict
from raytrain_adv.model.build import build
from raytrain_adv.transforms.applied import Transforms

SHORT = (4096, 32768)
"""Tokens of the steps that come first; the second shows torch.compile that lengths differ, and is
what it chooses its kernels for."""


def at(model: Whole, tokens: int, document: int | None) -> dict[str, Any]:
    """Train two steps at this length; where memory runs out, say so."""
    predicted = model.predicted_gib(tokens)
    step = model.stepper(tokens, document)
    graphs = counters["stats"]["unique_graphs"]
    reset_peak()
    try:
        first, seconds = timed(step), timed(step)
    except torch.OutOfMemoryError as error:
        model.optimizer.zero_grad(set_to_none=True)
        return {"out_of_memory": str(error).splitlines()[0], "predicted_gib": predicted}
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "first_seconds": first,
        "compiled_anew": counters["stats"]["unique_graphs"] - graphs,
        "peak_gib": peak_gib(),
        "predicted_gib": predicted,
    }


def planned(job: JobConfig, lengths: list[int]) -> None:
    """Print what the plan would predict."""
    model = build(job)
    Transforms(job).prepare(model)
    for tokens in lengths:
        found = predict(model, job, 1, tokens, 1)
        host = f", and {found.host_activations:.1f} GiB of host memory"
        print(f"{tokens:>8,} tokens: {found.total:6.1f} GiB, at {found.peak}{host}")


def main() -> None:
    """Try lengths until one does not fit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="65536,131072,163840", help="the shortest first")
    parser.add_argument("--plan", action="store_true", help="train nothing: predict")
    parser.add_argument("--eager", action="store_true", help="no torch_compile")
    parser.add_argument("--liger", action="store_true", help="use_liger_kernel")
    parser.add_argument("--loss-kernel", default="chunked")
    parser.add_argument("--optim", default="adamw_torch_fused")
    parser.add_argument("--long", action="store_true", help="what long sequences need")
    parser.add_argument("--offload", type=int, help="first layers whose activations move")
    parser.add_argument("--mode", help="gradient_checkpointing: full, or attention with --long")
    parser.add_argument("--documents", type=int, help="tokens of each document of a packed row")
    parser.add_argument("--attention", default="auto", help="flash_attn")
    parser.add_argument("--layers", type=int, help="of the model, if not all")
    parser.add_argument("--shape", default="{}", help="config keys to change, as JSON, for a trial")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    chosen = parser.parse_args()
    lengths = [int(part) for part in chosen.lengths.split(",")]
    keys = {
        "disable_gradient_checkpointing": False,
        "gradient_checkpointing": "full",
        "loss_kernel": chosen.loss_kernel,
        "optim": chosen.optim,
        "use_liger_kernel": chosen.liger,
    }
    keys |= {"flash_attn": chosen.attention, "neat_packing": chosen.documents is not None}
    if chosen.long:
        moved = True if chosen.offload is None else chosen.offload
        keys |= {"tiled_mlp": True, "activation_offloading": moved}
        keys["gradient_checkpointing"] = chosen.mode or "attention"
    if chosen.eager or chosen.plan:
        keys["torch_compile"] = not chosen.eager
    shape = {"max_position_embeddings": max(lengths), **json.loads(chosen.shape)}
    if chosen.layers:
        shape["num_hidden_layers"] = chosen.layers
    job = job_of(shape, **keys)
    if chosen.plan:
        planned(job, lengths)
        return
    torch._logging.set_logs(recompiles=True)
    model = Whole.of(job)
    for tokens in SHORT:
        model.stepper(tokens, chosen.documents)()
    figures: dict[str, dict[str, Any]] = {}
    for tokens in lengths:
        free()
        figures[str(tokens)] = at(model, tokens, chosen.documents)
        print(tokens, json.dumps(figures[str(tokens)]), flush=True)
        if "out_of_memory" in figures[str(tokens)]:
            break
    if chosen.out is not None:
        results = head_of_results(" ".join(["python", *sys.argv]))
        chosen.out.write_text(json.dumps({**results, "lengths": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
