"""Sequences that GPUs of a host share (sequence_parallel_size): memory and step times, 8B shape.

    python -m torch.distributed.run --nproc_per_node 2 jobs/benchmarks/context_parallel.py \\
        --tokens 131072 [--layers 2] [--document 16384] [--keys '{"tiled_mlp": true}'] [--out FILE]

All GPUs share every sequence; on one GPU, without torch.distributed.run, it has its own. `--tokens`
are of whole sequences, each of which trains two steps; `seconds` are the second one's. With
`--document` they are packed of documents of that length, which attention (PyTorch's varlen_attn)
keeps apart, so that it costs little: memory is that of any sequence. Before the steps logits and
gradients of a short row are compared with those of a GPU alone. Full activation checkpointing.
On a CPU, for a trial: `--shape '{"hidden_size": 64, ...}'`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import whole_steps
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from raytrain_adv.data.batches.collate import Inputs, Way, part_of, told
from raytrain_adv.ops.loss.function import loss_function
from raytrain_adv.ops.peer_copies import held_gib
from raytrain_adv.run.run import local_run
from raytrain_adv.worker.checks.step import clip
from raytrain_adv.worker.trials.sequence_parallel import split_sequences

VARLEN = "flash_attention_of_torch"


def attend_by_bounds(
    options: dict[str, Any],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention within documents, in transformers' calling convention; `options` are
    of varlen_attn.
    """
    from torch.nn.attention.varlen import varlen_attn

    known: Any = varlen_attn
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if "enable_gqa" not in options:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    bounds, longest = cu_seq_lens_q, max_length_q
    if bounds is None:  # in the trial of one document
        longest = len(q)
        bounds = torch.tensor([0, longest], dtype=torch.int32, device=q.device)
    output = known(q, k, v, bounds, bounds, longest, longest, scale=scaling, **options)
    return output.reshape(query.shape[0], -1, *output.shape[1:]), None


def use_bounds(model: PreTrainedModel) -> None:
    """Have the model attend by bounds, as with a package of flash attention."""
    from torch.nn.attention.varlen import varlen_attn

    accepted = inspect.signature(varlen_attn).parameters  # differs between releases of PyTorch
    newer = {"window_size": (-1, 0), "enable_gqa": True}
    options = {name: value for name, value in newer.items() if name in accepted}
    if "window_size" not in options:
        options["is_causal"] = True
    functions: Any = ALL_ATTENTION_FUNCTIONS
    masks: Any = ALL_MASK_ATTENTION_FUNCTIONS
    functions.register(VARLEN, partial(attend_by_bounds, options))
    masks.register(VARLEN, masks["flash_attention_2"])
    model.config._attn_implementation = VARLEN


def row(tokens: int, document: int | None, words: int) -> tuple[Inputs, torch.Tensor]:
    """Return a random sequence, the same on every rank, and its labels, on the CPU."""
    ids = torch.randint(words, (1, tokens + 1), generator=torch.Generator().manual_seed(0))
    inputs: Inputs = {"input_ids": ids[:, :-1].contiguous()}
    if document is not None:
        positions = torch.arange(tokens)[None] % document
        inputs = told({"input_ids": ids[:, :-1].contiguous(), "position_ids": positions}, "bounds")
        inputs |= {"max_length_q": document, "max_length_k": document}
    return inputs, ids[:, 1:].contiguous()


def at(whole: whole_steps.Whole, tokens: int, document: int | None) -> dict[str, Any]:
    """Train two steps at this length; where memory runs out, say so."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    inputs, labels = row(tokens, document, whole.model.config.vocab_size)
    if world > 1:
        own = slice(tokens // world * rank, tokens // world * (rank + 1))
        inputs, labels = part_of(inputs, own), labels[:, own]
    device = whole_steps.DEVICE
    labels = labels.to(device)
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    loss_sum = loss_function(whole.model, whole.job.parallel.torch_compile)

    def step() -> float:
        loss = loss_sum(whole.model, inputs, labels)
        (loss * (world / tokens)).backward()
        norm = clip(whole.optimizer, 1.0)
        whole.optimizer.step()
        whole.optimizer.zero_grad(set_to_none=True)
        total = loss.detach().double()
        if world > 1:
            dist.all_reduce(total)
        losses.append((float(total) / tokens, float(norm)))
        return losses[-1][0]

    losses: list[tuple[float, float]] = []
    predicted = whole.predicted_gib(tokens, world)
    whole_steps.reset_peak()
    try:
        first, seconds = whole_steps.timed(step), whole_steps.timed(step)
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).splitlines()[0], "predicted_gib": predicted}
    return {
        "seconds": seconds,
        "first_seconds": first,
        "tokens_per_second_per_gpu": tokens / world / seconds,
        "losses_and_norms": losses,
        "peak_gib": whole_steps.peak_gib() + held_gib(),
        "predicted_gib": predicted,
    }


def main() -> None:
    """Measure each length; rank 0 prints and writes after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[131072])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--document", type=int, help="tokens of each packed document")
    parser.add_argument("--keys", default="{}", help="of the job, as JSON")
    parser.add_argument("--shape", default="{}", help="config keys to change, as JSON, for a trial")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    chosen = parser.parse_args()
    rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if torch.cuda.is_available():
        whole_steps.DEVICE = torch.device("cuda", rank)
        torch.cuda.set_device(rank)
    shape = {"num_hidden_layers": chosen.layers, "max_position_embeddings": max(chosen.tokens)}
    keys = {
        "disable_gradient_checkpointing": False,
        "gradient_checkpointing": "full",
        "loss_kernel": "chunked",
        "neat_packing": chosen.document is not None,
        "use_cpu": not torch.cuda.is_available(),
        "sequence_parallel_size": world,
        "ray_num_workers": world,
    }
    keys |= json.loads(chosen.keys)
    job = whole_steps.job_of({**shape, **json.loads(chosen.shape)}, **keys)
    run = local_run(job, whole_steps.DEVICE)
    whole = whole_steps.Whole.of(job)
    if chosen.document is not None:
        use_bounds(whole.model)
    way: Way = "positions" if chosen.document is None else "bounds"
    results = whole_steps.head_of_results("python -m torch.distributed.run " + " ".join(sys.argv))
    results |= {"shared": split_sequences(job, whole.model, run, way), "figures": {}}
    for tokens in chosen.tokens:
        whole_steps.free()
        found = results["figures"][tokens] = at(whole, tokens, chosen.document)
        if rank == 0:
            print(tokens, json.dumps(found), flush=True)
            if chosen.out is not None:
                chosen.out.write_text(json.dumps(results, indent=1) + "\n")
        if "out_of_memory" in found:
            break
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
