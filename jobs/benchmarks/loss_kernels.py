"""The four loss kernels beside each other on one GPU: 8B shape, 8,192 tokens.

    python jobs/benchmarks/loss_kernels.py [--out jobs/benchmarks/results/loss_kernels.json]
    ... --parts alone            head and loss without a model
    ... --precisions fp8         whole steps with the linears in FP8

`alone` times forward and backward of head and loss and gives the peak memory over the head's weight
and the hidden states; `step` whole training steps, compiled, without activation checkpointing. In
both torch comes first and again last, so that what the card's clock does is seen. `@1024` and
`@2048` are the chunked loss with chunks of that many tokens, `@float32` has its weight gradient
added up in float32; `float8` is fp8_lm_head, alone.
"""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from whole_steps import (
    DEVICE,
    Whole,
    free,
    head_of_results,
    held_gib,
    job_of,
    measured,
    peak_gib,
    reset_peak,
)

from raytrain_adv.ops.float8.head_loss import Float8Head
from raytrain_adv.ops.loss import linear_cross_entropy as ops
from raytrain_adv.ops.loss.function import cross_entropy_sum
from raytrain_adv.ops.loss.head import BACKENDS, HeadLoss, install, remove
from raytrain_adv.ops.loss.linear_cross_entropy import LogitMap

KERNELS = ("torch", "chunked", "chunked@1024", "chunked@2048", "cut_cross_entropy", "liger")
Result = dict[str, Any]


@contextmanager
def chunking(name: str, vocab: int):
    """Set the chunked loss up as the part of a variant's name after the @ says."""
    before = ops.CHUNK_BYTES, ops.MOST_ROUNDINGS
    kernel, _, how = name.partition("@")
    if how.isdigit():
        ops.CHUNK_BYTES = int(how) * vocab * torch.bfloat16.itemsize
    if how == "float32":
        ops.MOST_ROUNDINGS = 0
    yield kernel
    ops.CHUNK_BYTES, ops.MOST_ROUNDINGS = before


def attempted(name: str, measure: Callable[[], Result]) -> Result:
    """Measure, or say why it could not be; the others are still wanted."""
    try:
        result = measure()
    except (ImportError, RuntimeError) as error:
        result = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
    free()
    print(name, json.dumps(result), file=sys.stderr, flush=True)
    return result


def alone(kernel: str, tokens: int, hidden: int, vocab: int, steps: int) -> Result:
    """Measure head and loss by themselves; gradients are held against torch's in float32."""
    torch.manual_seed(0)
    options = {"device": DEVICE, "dtype": torch.bfloat16}
    head = Float8Head.from_float(torch.nn.Linear(hidden, vocab, bias=False, **options))
    head.weight.data.normal_(std=0.02)
    weight = head.weight
    states = torch.randn(tokens, hidden, **options).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), device=DEVICE)
    compiled = torch.compile(cross_entropy_sum) if DEVICE.type == "cuda" else cross_entropy_sum

    def loss_of() -> torch.Tensor:
        if kernel == "torch":
            return compiled(F.linear(states, weight), labels)
        if kernel == "float8":
            return head.cross_entropy(states, labels, LogitMap())
        return BACKENDS[kernel](states, weight, None, labels, LogitMap())

    def passes() -> None:
        states.grad = weight.grad = None
        (loss_of() * (1 / tokens)).backward()

    held = held_gib()
    result = measured(passes, steps, warm_up=3)
    result["peak_over_hidden_gib"] = result.pop("peak_gib") - held
    reset_peak()
    with torch.no_grad():
        result["loss"] = loss_of().item() / tokens
    result["eval_peak_over_hidden_gib"] = peak_gib() - held_gib()
    result["gradients_off_float32"] = off_float32(states, weight, labels)
    return result


def off_float32(states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """Return how far the gradients of input and weight lie from float32's, relative norms."""
    exact_states, exact_weight = (t.detach().float() for t in (states, weight))
    of_weight = torch.zeros_like(exact_weight)
    of_states = torch.zeros_like(exact_states)
    for part in range(0, len(labels), 512):
        rows = exact_states[part : part + 512]
        gradient = torch.softmax(rows @ exact_weight.t(), dim=-1)
        target = labels[part : part + 512, None]
        gradient.scatter_add_(-1, target, torch.full_like(target, -1.0, dtype=torch.float32))
        gradient /= len(labels)
        of_weight.addmm_(gradient.t(), rows)
        of_states[part : part + 512] = gradient @ exact_weight
    pairs = ((states.grad, of_states), (weight.grad, of_weight))
    return [((mine.float() - exact).norm() / exact.norm()).item() for mine, exact in pairs]


def whole(name: str, model: Whole, tokens: int, steps: int) -> Result:
    """Measure training steps of a model whose head takes this variant's loss."""
    vocab = model.model.config.vocab_size
    with chunking(name, vocab) as kernel:
        head = model.model.get_output_embeddings()
        if kernel != "torch":
            install(model.model, head, HeadLoss(kernel, LogitMap(), True, vocab))
        try:
            step = model.stepper(tokens)
            losses = []
            result = measured(lambda: losses.append(step()), steps, warm_up=3)
        finally:
            if kernel != "torch":
                remove(model.model, head)
            model.optimizer.zero_grad(set_to_none=True)
    return {**result, "tokens_per_second": tokens / result["seconds"], "first_loss": losses[0]}


def table(figures: dict[str, dict[str, Result]]) -> str:
    """Return the figures as a short table."""
    lines = []
    for part, of_kernels in figures.items():
        lines.append(f"{part:<16} {'ms':>8} {'/ torch':>8} {'peak GiB':>9}")
        base = of_kernels.get("torch", {}).get("seconds")
        for kernel, result in of_kernels.items():
            if "failed" in result:
                lines.append(f"  {kernel:<18} {result['failed'][:70]}")
                continue
            memory = result.get("peak_over_hidden_gib", result.get("peak_gib", 0.0))
            ratio = result["seconds"] / base if base else float("nan")
            lines.append(
                f"  {kernel:<18} {1e3 * result['seconds']:>4.1f} {ratio:>8.3f} {memory:>9.2f}"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure what is asked for, print a table, write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="alone,step")
    parser.add_argument("--precisions", default="bf16", help="bf16, fp8, or both")
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=8, help="measured, after three")
    parser.add_argument("--shape", default="{}", help="config keys to change, as JSON, for a trial")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    chosen = parser.parse_args()
    changed, kernels = json.loads(chosen.shape), chosen.kernels.split(",")
    figures: dict[str, dict[str, Result]] = {}
    if "alone" in chosen.parts:
        sizes = job_of(changed).model.model_name_or_path
        config = json.loads((Path(sizes) / "config.json").read_text())
        figures["head and loss"] = {}
        for name in [*kernels, "torch again"]:
            with chunking(name.removesuffix(" again"), config["vocab_size"]) as kernel:
                figures["head and loss"][name] = attempted(
                    name,
                    lambda kernel=kernel: alone(
                        kernel,
                        chosen.tokens,
                        config["hidden_size"],
                        config["vocab_size"],
                        chosen.steps,
                    ),
                )
    for precision in chosen.precisions.split(",") if "step" in chosen.parts else ():
        keys = {"fp8": True} if precision == "fp8" else {}
        model = Whole.of(job_of(changed, loss_kernel="torch", **keys))
        part = figures[f"step, {precision}"] = {}
        for name in [*kernels, "torch again"]:
            plain = name.removesuffix(" again")
            part[name] = attempted(
                name,
                lambda name=plain, model=model: whole(name, model, chosen.tokens, chosen.steps),
            )
        del model
        free()
    results = {**head_of_results(" ".join(["python", *sys.argv])), "tokens": chosen.tokens}
    results["note"] = "seconds: medians; peak_over_hidden_gib: over weight and hidden states"
    if chosen.out is not None:
        chosen.out.write_text(json.dumps({**results, "figures": figures}, indent=1) + "\n")
    print(table(figures))


if __name__ == "__main__":
    main()
