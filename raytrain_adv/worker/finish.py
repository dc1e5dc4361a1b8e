"""After the last step: answer sample prompts, export the model, evaluate the twins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.prepare import PreparedData
from raytrain_adv.dtensor import reshard
from raytrain_adv.estimate.flops import text_config
from raytrain_adv.model.adapter import load_adapter
from raytrain_adv.model.weights import load_pretrained
from raytrain_adv.run.run import Run
from raytrain_adv.transforms.lora import Lora
from raytrain_adv.worker.loop import TrainState, evaluate_variants

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

MAX_ANSWER_TOKENS = 96
BUCKET = 256
"""Prompt and answer are padded to a multiple of this: one shape, so one compiled graph."""
NUM_COMPARED = 1024
"""Most tokens on which the export compares its models."""


@dataclass(frozen=True)
class Exported:
    """The models that a run leaves, by the names of the report."""

    model_dir: str | None = None
    model_gib: float | None = None
    """Size on disk."""
    quantized_dir: str | None = None
    quantized_gib: float | None = None
    quantized_logit_difference: float | None = None
    """Largest difference between its logits and those of the model trained with fake quantization,
    on rank 0."""
    quantized_comparison: str = ""
    """On what and where they were compared."""


ExportFunction = Callable[
    [PreTrainedModel, JobConfig, Path, "PreTrainedTokenizerBase", torch.Tensor], Exported
]
"""Writes the model folders; all ranks call it with held-out token ids [tokens]."""


def sample_answers(
    state: TrainState, tokenizer: PreTrainedTokenizerBase, data: PreparedData
) -> list[dict[str, str]]:
    """Return the model's answers to held-out prompts: {prompt, answer, reference}."""
    count = state.job.output.num_sample_answers
    if count == 0:
        return []
    stop = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    samples = []
    with state.run.phase("sample answers"):
        for ids, text, reference in data.prompts(count, tokenizer):
            answer = greedy_answer(state.model, list(ids), stop, state.run.device)
            decoded = tokenizer.decode(answer, skip_special_tokens=True)
            samples.append({"prompt": text, "answer": str(decoded), "reference": reference})
    return samples


@torch.no_grad()
def greedy_answer(
    model: nn.Module,
    prompt: list[int],
    stop: set[int],
    device: torch.device,
    max_new_tokens: int = MAX_ANSWER_TOKENS,
) -> list[int]:
    """Return the greedily decoded continuation of `prompt` (token ids), without the stop token;
    empty if the prompt fills all positions of the model.

    Every rank must call this with the same prompt: each forward pass gathers sharded parameters.
    There is no cache of keys and values; causal attention makes the padding on the right harmless.
    """
    positions = getattr(text_config(model), "max_position_embeddings", None)
    if positions is not None:
        max_new_tokens = min(max_new_tokens, positions - len(prompt))
    if max_new_tokens < 1 or not prompt:
        return []
    model.eval()
    length = -(-(len(prompt) + max_new_tokens) // BUCKET) * BUCKET
    length = length if positions is None else min(length, positions)
    tokens = torch.full((1, length), prompt[-1], dtype=torch.long, device=device)
    tokens[0, : len(prompt)] = torch.tensor(prompt, device=device)
    end = len(prompt)
    for position in range(len(prompt), len(prompt) + max_new_tokens):
        logits = model(input_ids=tokens, use_cache=False).logits
        choice = logits[0, position - 1].argmax()
        if dist.is_initialized():  # GPUs may round differently, and all must continue alike
            dist.broadcast(choice, src=0)
        chosen = int(choice)
        if chosen in stop:
            break
        tokens[0, position] = chosen
        end = position + 1
    model.train()
    reshard(model)
    answer: list[int] = tokens[0, len(prompt) : end].tolist()
    return answer


def export(
    job: JobConfig,
    run: Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    write: ExportFunction,
) -> Exported:
    """Write output_dir/model, and the quantized model if there is one, on rank 0."""
    if not job.output.export_model:
        return Exported()
    with run.phase("export"):
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        out = Path(job.output.output_dir) / "model"
        exported = write(model, job, out, tokenizer, tokens_to_compare(data))
        run.barrier()
    return exported


def tokens_to_compare(data: PreparedData) -> torch.Tensor:
    """Return token ids [tokens] of the first held-out rows, or of training rows if there are none
    held out.
    """
    parts: list[NDArray[np.int32]] = []
    for sequence in data.eval or data.train:
        parts.append(sequence.input_ids)
        if sum(map(len, parts)) >= NUM_COMPARED:
            break
    return torch.from_numpy(np.concatenate(parts)[:NUM_COMPARED])


def evaluate_twins(state: TrainState, model: PreTrainedModel) -> None:
    """Evaluate in this run's model the twins: the same job, trained before without a feature. Its
    own weights, already exported, are lost.
    """
    job = state.job
    for transform in state.transforms:
        twin = transform.twin(job)
        if twin is None or state.held_out is None:
            continue
        folder = Path(twin[0]) / "model"
        with state.run.phase("twin"):
            if job.transform(Lora).enabled:
                load_adapter(model, folder)
            else:
                source = {"model_name_or_path": str(folder), "train_from_scratch": False}
                trained = replace(job, model=job.model.model_copy(update=source))
                load_pretrained(model, trained, state.run.device)
            evaluate_variants(state, state.arithmetic.total_steps, of="twin")
