"""The HF Trainer on the work of llama3_8b_bf16.yaml: what LLaMA-Factory and Axolotl drive.

    python jobs/benchmarks/hf_trainer.py
    python jobs/benchmarks/hf_trainer.py --liger --checkpointing --eager
    ... --tokens 131072 --warm-up 1 --warm-up-tokens 2048 --steps 1       does that length fit?

Prints a JSON line: median step after the warm-up, tokens/s, peak memory. Random weights of the 8B
shape, bf16, torch_compile, fused AdamW, one sequence of 8,192 tokens a step.
"""

import argparse
import json
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

ROOT = Path(__file__).parents[2]


class RandomTokens(torch.utils.data.Dataset):
    """Sequences of random token ids, the same at each run; the first ones may be shorter."""

    def __init__(self, vocab_size: int, length: int, first: list[int]) -> None:
        self.vocab_size, self.length, self.first = vocab_size, length, first

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        length = self.first.pop(0) if self.first else self.length
        ids = torch.randint(0, self.vocab_size, (length,), generator=generator)
        return {"input_ids": ids, "labels": ids}


class Clock(TrainerCallback):
    """Notes when training begins and each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *args: object, **options: object) -> None:
        """Look at the clock."""
        self.on_step_end()

    def on_step_end(self, *args: object, **options: object) -> None:
        """Wait for the GPU and look at the clock."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.time())


def with_lora(model: PreTrainedModel) -> PeftModel:
    """Return a model with PEFT's adapters on all linears and on the experts' stacked matrices."""
    stacks = [name for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3]
    ends = sorted({".".join(name.split(".")[-2:]) for name in stacks}) or None
    model.enable_input_require_grads()
    return get_peft_model(
        model, LoraConfig(r=16, target_modules="all-linear", target_parameters=ends)
    )


def main() -> None:
    """Train some steps and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "jobs/models/llama3-8b-shape"))
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a sequence")
    parser.add_argument("--shape", default="{}", help="config keys to change, as JSON, for a trial")
    parser.add_argument("--liger", action="store_true", help="use_liger_kernel")
    parser.add_argument("--checkpointing", action="store_true", help="gradient_checkpointing")
    parser.add_argument("--eager", action="store_true", help="no torch_compile")
    parser.add_argument("--lora", action="store_true", help="PEFT, on linears and stacked experts")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation")
    parser.add_argument("--steps", type=int, default=8, help="steps measured")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before those")
    parser.add_argument("--warm-up-tokens", type=int, help="their tokens, if they differ")
    chosen = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    config = AutoConfig.from_pretrained(chosen.model, **json.loads(chosen.shape))
    config.max_position_embeddings = max(config.max_position_embeddings, chosen.tokens)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if on_gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=chosen.attention)
    torch.set_default_dtype(torch.float32)
    model.config.use_cache = False
    if chosen.lora:
        model = with_lora(model)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=1,
            max_steps=chosen.steps + chosen.warm_up,
            bf16=True,
            torch_compile=on_gpu and not chosen.eager,
            use_liger_kernel=chosen.liger,
            gradient_checkpointing=chosen.checkpointing,
            optim="adamw_torch_fused",
            learning_rate=1e-5,
            logging_steps=1000,
            save_strategy="no",
            report_to=[],
            use_cpu=not on_gpu,
        )
        first = [chosen.warm_up_tokens or chosen.tokens] * chosen.warm_up
        data = RandomTokens(config.vocab_size, chosen.tokens, first)
        try:
            Trainer(model=model, args=arguments, train_dataset=data, callbacks=[clock]).train()
        except torch.OutOfMemoryError as error:
            print(json.dumps({"out_of_memory": str(error).splitlines()[0]}))
            return
    ends = clock.ends[chosen.warm_up :]
    steps = [b - a for a, b in pairwise(ends)]
    median = sorted(steps)[len(steps) // 2]
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    print(json.dumps({"step_s": median, "tokens_s": chosen.tokens / median, "peak_gib": peak}))


if __name__ == "__main__":
    main()
