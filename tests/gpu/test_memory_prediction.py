"""The prediction against a GPU; run as a script, this prints a table of variants.

python -m tests.gpu.test_memory_prediction [what the variants' names begin with]
"""

import gc
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from raytrain_adv.config import JobConfig
from raytrain_adv.config.job import SECTIONS
from raytrain_adv.estimate.memory import predict
from raytrain_adv.model import parallel
from raytrain_adv.model.build import build
from raytrain_adv.model.weights import materialize
from raytrain_adv.ops.loss.function import loss_function
from raytrain_adv.text import GIB
from raytrain_adv.transforms import discover
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.worker.checks.step import clip
from raytrain_adv.worker.optim import build_optimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("large"),  # models that fill a GPU are tried one after another
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one GPU"),
]

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
LLAMA_8B = {
    **LLAMA,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "tie_word_embeddings": False,
}
LLAMA_1B = {
    **LLAMA,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "tie_word_embeddings": True,
}
HEADS = {"num_attention_heads": 32, "num_hidden_layers": 4, "max_position_embeddings": 131072}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        **HEADS,
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "vocab_size": 151936,
    },
    "deepseek_v3": {
        **HEADS,
        "architectures": ["DeepseekV3ForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_key_value_heads": 32,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1,
        "vocab_size": 129280,
    },
    "qwen3_next": {
        **HEADS,
        "architectures": ["Qwen3NextForCausalLM"],
        "num_attention_heads": 16,
        "num_experts": 128,
        "vocab_size": 151936,
    },
    "mixtral": {
        **HEADS,
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 2,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
}
"""Widths of real mixtures, with fewer layers and experts."""
PURE: dict[str, Any] = {"pure_bf16": True, "torch_compile": True}
MASTER: dict[str, Any] = {"bf16": True, "torch_compile": True}
LORA: dict[str, Any] = {
    "bf16": True,
    "torch_compile": True,
    "finetuning_type": "lora",
    "lora_rank": 16,
}
NONE, FULL, SELECTIVE = ({"gradient_checkpointing": m} for m in ("none", "full", "selective"))
EAGER: dict[str, Any] = {"torch_compile": False}
NF4: dict[str, Any] = {"quantization_bit": 4}

Variant = tuple[str, dict[str, Any], dict[str, Any], int]
VARIANTS: tuple[Variant, ...] = (
    ("8B pure_bf16, compiled, none", LLAMA_8B, {**PURE, **NONE}, 8192),
    ("8B pure_bf16, compiled, full", LLAMA_8B, {**PURE, **FULL}, 8192),
    ("8B pure_bf16, compiled, selective", LLAMA_8B, {**PURE, **SELECTIVE}, 8192),
    ("1B float32 master, compiled, none", LLAMA_1B, {**MASTER, **NONE}, 8192),
    ("1B float32 master, eager, full", LLAMA_1B, {**MASTER, **EAGER, **FULL}, 8192),
    ("8B QLoRA nf4, compiled, none", LLAMA_8B, {**LORA, **NF4, **NONE}, 8192),
    ("8B QLoRA nf4, eager, full", LLAMA_8B, {**LORA, **NF4, **EAGER, **FULL}, 8192),
    ("8B LoRA, compiled, none", LLAMA_8B, {**LORA, **NONE}, 8192),
    ("8B LoRA, eager, full", LLAMA_8B, {**LORA, **EAGER, **FULL}, 8192),
    ("8B pure_bf16, eager, none", LLAMA_8B, {**PURE, **EAGER, **NONE}, 8192),
    ("8B pure_bf16, eager, selective", LLAMA_8B, {**PURE, **EAGER, **SELECTIVE}, 8192),
    (
        "1B pure_bf16, eager attention, none",
        LLAMA_1B,
        {**PURE, **EAGER, **NONE, "flash_attn": "disabled"},
        2048,
    ),
    (
        "1B pure_bf16, eager, neat packing",
        LLAMA_1B,
        {**PURE, **EAGER, **NONE, "neat_packing": True},
        8192,
    ),
    (
        "1B float32 master, plain AdamW, full",
        LLAMA_1B,
        {**MASTER, **FULL, "optim": "adamw_torch"},
        2048,
    ),
    (
        "8B pure_bf16, 8-bit AdamW, full",
        LLAMA_8B,
        {**PURE, **FULL, "optim": "adamw_torch_8bit"},
        8192,
    ),
)
MIXTURE_VARIANTS: tuple[Variant, ...] = tuple(
    (f"{kind}, {how}, {mode['gradient_checkpointing']}", {"model_type": kind, **config}, keys, 8192)
    for kind, config in MIXTURES.items()
    for mode in (NONE, FULL)
    for how, keys in (("compiled", {**PURE, **mode}), ("eager", {**PURE, **EAGER, **mode}))
)


def job_with(**keys: Any) -> JobConfig:
    """Return a job with the given keys and no checks."""
    keys = {"output_dir": "unused", "finetuning_type": "full", "train_from_scratch": True, **keys}

    def part(kind: Any) -> Any:
        return kind(**{k: v for k, v in keys.items() if k in kind.model_fields})

    sections: dict[str, Any] = {name: part(kind) for name, kind in SECTIONS.items()}
    return JobConfig(**sections, transforms=tuple(part(kind) for kind in discover()))


@pytest.fixture(scope="module", autouse=True)
def one_process_group() -> Iterator[None]:
    start_process_group()
    yield
    dist.destroy_process_group()


def start_process_group() -> None:
    """Let this process be the only worker."""
    here = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571"}
    os.environ.update(here)
    dist.init_process_group("nccl")


class TooLarge(RuntimeError):
    """A variant does not fit on this GPU, by its prediction."""


def measure(config: dict[str, Any], keys: dict[str, Any], seq_len: int) -> tuple[float, float, str]:
    """Return predicted and measured peak in GiB of a step that is not the first, and its moment."""
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        job = job_with(model_name_or_path=folder, per_device_train_batch_size=1, **keys)
        model = build(job)
    Transforms(job).prepare(model)
    predicted = predict(model, job, 1, seq_len, 1)
    device = torch.device("cuda")
    there = torch.cuda.mem_get_info(device)[1] / GIB
    if predicted.total > there:
        raise TooLarge(f"needs {predicted.total:.1f} GiB; this GPU has {there:.1f}")
    parallel.shard(model, job, parallel.build_mesh(job, device))
    materialize(model, device)
    optimizer, loss_sum = (
        build_optimizer(model, job),
        loss_function(model, job.parallel.torch_compile),
    )
    inputs = {"input_ids": torch.randint(0, config["vocab_size"], (1, seq_len), device=device)}
    if job.data.neat_packing:
        inputs["position_ids"] = (torch.arange(seq_len, device=device) % 1000)[None]
    for step in range(3):
        if step == 2:
            torch.cuda.reset_peak_memory_stats()
        loss = loss_sum(model, inputs, inputs["input_ids"]) / seq_len
        loss.backward()
        clip(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    measured = torch.cuda.max_memory_allocated() / GIB
    return predicted.total, measured, predicted.peak


def free() -> None:
    """Give the last variant's memory back."""
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize(
    "name, config, keys, seq_len", VARIANTS[:6], ids=[v[0] for v in VARIANTS[:6]]
)
def test_prediction_is_within_ten_percent_of_the_peak(
    name: str, config: dict[str, Any], keys: dict[str, Any], seq_len: int
) -> None:
    try:
        predicted, measured, _ = measure(config, keys, seq_len)
    except TooLarge as error:
        pytest.skip(str(error))
    finally:
        free()
    assert predicted == pytest.approx(measured, rel=0.1)


def main() -> None:
    """Write predicted and measured memory of every variant."""
    start_process_group()
    for name, config, keys, seq_len in (*VARIANTS, *MIXTURE_VARIANTS):
        if len(sys.argv) > 1 and not name.startswith(sys.argv[1]):
            continue
        try:
            predicted, measured, at = measure(config, keys, seq_len)
        except (RuntimeError, ValueError, TypeError) as error:
            line = f"{type(error).__name__}: {str(error)[:300]}"
        else:
            off = predicted / measured - 1
            line = f"predicted {predicted:6.2f}  measured {measured:6.2f}  {off:+6.1%}  at {at}"
        sys.stdout.write(f"{name:40} {line}\n")
        sys.stdout.flush()
        free()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
