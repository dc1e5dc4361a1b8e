"""The examples of jobs/cards: each plans, by its model's shape, in the memory README names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from raytrain_adv.config import load
from raytrain_adv.driver.plan.data import DataSummary
from raytrain_adv.driver.plan.plan import resolve

ROOT = Path(__file__).parents[2]
CARDS = ROOT / "jobs" / "cards"
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
    "max_position_embeddings": 131072, "dtype": "bfloat16",
}  # fmt: skip
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936,
    "head_dim": 128, "max_position_embeddings": 40960, "tie_word_embeddings": True,
    "dtype": "bfloat16",
}  # fmt: skip
GEMMA = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 262144,
    "head_dim": 256, "num_key_value_heads": 1, "num_attention_heads": 4,
    "max_position_embeddings": 32768, "sliding_window": 512, "dtype": "bfloat16",
}  # fmt: skip


def sized(shape: dict[str, Any], hidden: int, inner: int, layers: int, **more: Any):
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return shape | sizes | more


HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA_3B = sized(
    LLAMA, 3072, 8192, 28, num_attention_heads=24, num_key_value_heads=8, head_dim=128,
    tie_word_embeddings=True,
)  # fmt: skip
QWEN_HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.2-1B-Instruct": sized(
        LLAMA, 2048, 8192, 16, **HEADS, head_dim=64, tie_word_embeddings=True
    ),
    "meta-llama/Llama-3.2-3B-Instruct": LLAMA_3B,
    "meta-llama/Llama-3.1-8B": sized(LLAMA, 4096, 14336, 32, **HEADS, head_dim=128),
    "Qwen/Qwen3-0.6B": sized(QWEN3, 1024, 3072, 28, **QWEN_HEADS),
    "Qwen/Qwen3-1.7B": sized(QWEN3, 2048, 6144, 28, **QWEN_HEADS),
    "google/gemma-3-270m-it": sized(GEMMA, 640, 2048, 18),
    "google/gemma-3-1b-it": sized(GEMMA, 1152, 6912, 26),
    "HuggingFaceTB/SmolLM2-135M-Instruct": sized(
        LLAMA, 576, 1536, 30, vocab_size=49152, num_attention_heads=9, num_key_value_heads=3,
        max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": sized(
        QWEN3, 2048, 6144, 48, architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe",
        num_attention_heads=32, num_key_value_heads=4, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768, decoder_sparse_step=1, tie_word_embeddings=False,
    ),
}  # fmt: skip
QUICK = ("llama3_1b_qlora", "qwen3_0.6b_qat_8da4w")
ROW = re.compile(r"\| \[(\S+)\]\(cards/\S+\) \|.* of (\d+) GB.*\| ([\d.]+) GiB \|")
README = (ROOT / "jobs" / "README.md").read_text()
LISTED = {m[1]: (float(m[3]), int(m[2])) for m in ROW.finditer(README)}
"""The predicted memory in GiB, and the card's memory in GB."""


def test_readme_lists_every_example() -> None:
    assert LISTED.keys() == {path.name for path in CARDS.glob("*.yaml")}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[] if path.stem in QUICK else pytest.mark.slow, id=path.stem)
        for path in sorted(CARDS.glob("*.yaml"))
    ],
)
def test_each_example_plans_in_the_memory_that_readme_predicts(path: Path, tmp_path: Path) -> None:
    named = load(path).model.model_name_or_path
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[named]))
    (tmp_path / "model.safetensors").touch()
    job = load(path, [f"model_name_or_path={tmp_path}"])
    cutoff = job.data.cutoff_len
    data = DataSummary(50_000, 50_000, 50_000 * cutoff // 2, cutoff, 200, None)
    plan = resolve(job, world_size=int(job.ray.ray_num_workers), data=data)
    predicted, card_gb = LISTED[path.name]
    assert plan.memory.total == pytest.approx(predicted, abs=0.06)
    assert plan.memory.total < 0.9 * card_gb  # GiB below GB, and room for what is not predicted
