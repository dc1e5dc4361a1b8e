"""The longest sequence that one GPU trains: 8B shape, full activation checkpointing.

    python jobs/benchmarks/longest_sequence.py [--out jobs/benchmarks/results/longest_sequence.json]
    ... --from 65536 --to 131072 --optim adamw_torch_8bit

Lengths are doubled until memory runs out. The first length gets two steps, so that the optimizer's
states are there; each other one. The same on the HF Trainer with Liger, a process per length:

    python jobs/benchmarks/hf_trainer.py --liger --checkpointing --eager --tokens 32768 --steps 1
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from whole_steps import Whole, free, head_of_results, job_of, peak_gib, reset_peak, timed


def at(model: Whole, tokens: int, is_first: bool) -> dict[str, Any]:
    """Train a step at this length; where memory runs out, say so."""
    torch._dynamo.reset()
    predicted = model.predicted_gib(tokens)
    step = model.stepper(tokens)
    try:
        if is_first:
            step()
        reset_peak()
        seconds = timed(step)
    except torch.OutOfMemoryError as error:
        model.optimizer.zero_grad(set_to_none=True)
        return {"out_of_memory": str(error).splitlines()[0], "predicted_gib": predicted}
    return {
        "seconds_with_compilation": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_gib": peak_gib(),
        "predicted_gib": predicted,
    }


def main() -> None:
    """Double the length until it does not fit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="first", type=int, default=32768)
    parser.add_argument("--to", dest="last", type=int, default=262144)
    parser.add_argument("--loss-kernel", default="chunked")
    parser.add_argument("--optim", default="adamw_torch_fused")
    parser.add_argument("--shape", default="{}", help="config keys to change, as JSON, for a trial")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    chosen = parser.parse_args()
    keys = {
        "disable_gradient_checkpointing": False,
        "gradient_checkpointing": "full",
        "loss_kernel": chosen.loss_kernel,
        "optim": chosen.optim,
    }
    lengths = {"max_position_embeddings": chosen.last}
    model = Whole.of(job_of({**lengths, **json.loads(chosen.shape)}, **keys))
    figures: dict[str, dict[str, Any]] = {}
    tokens = chosen.first
    while tokens <= chosen.last:
        figures[str(tokens)] = at(model, tokens, is_first=tokens == chosen.first)
        print(tokens, json.dumps(figures[str(tokens)]), flush=True)
        free()
        if "out_of_memory" in figures[str(tokens)]:
            break
        tokens *= 2
    if chosen.out is not None:
        results = head_of_results(" ".join(["python", *sys.argv]))
        chosen.out.write_text(json.dumps({**results, "lengths": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
