"""After the last step: answer sample prompts, export the model, evaluate the twins."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from raytrain_adv.text import plural
from raytrain_adv.transforms.lora import Lora
from raytrain_adv.worker.evaluation import evaluate_variants
from raytrain_adv.worker.loop import TrainState

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

MAX_ANSWER_TOKENS = 96
MAX_ANSWERS_S = 120  # of all answers: on a CPU they took longer than a short training
BUCKET = 256  # prompt and answer are padded to a multiple of this: one shape, so one compiled graph
LATE = -1  # instead of a token: the answers have taken too long
NUM_COMPARED = 1024  # most tokens on which the export compares its models


@dataclass(frozen=True)
class Exported:
    """The models that a run leaves; `converted` is the report of one that a feature exports."""

    model_dir: str | None = None
    model_gib: float | None = None
    converted: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folders(self) -> list[str]:
        """The folders of converted models."""
        return [str(value) for name, value in self.converted.items() if name.endswith("_dir")]

    def figures(self) -> dict[str, Any]:
        """Return all of it by the names of the report."""
        return {"model_dir": self.model_dir, "model_gib": self.model_gib, **self.converted}


ExportFunction = Callable[
    [PreTrainedModel, JobConfig, Path, "PreTrainedTokenizerBase", torch.Tensor], Exported
]
"""Writes the model folders; all ranks call it with held-out token ids [tokens]."""


def sample_answers(
    state: TrainState, tokenizer: PreTrainedTokenizerBase, data: PreparedData
) -> list[dict[str, str]]:
    """Return the model's answers to held-out prompts: {prompt, answer, reference, cut}."""
    count = state.job.output.num_sample_answers
    if count == 0:
        return []
    stop = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    samples = []
    deadline = time.monotonic() + MAX_ANSWERS_S
    with state.run.phase("sample answers"):
        for ids, text, reference in data.prompts(count, tokenizer):
            answer, cut = greedy_answer(
                state.model, list(ids), stop, state.run.device, deadline=deadline
            )
            decoded = str(tokenizer.decode(answer, skip_special_tokens=True))
            sample = {"prompt": text, "answer": decoded, "reference": reference, "cut": cut}
            samples.append(sample)
    return samples


@torch.no_grad()
def greedy_answer(
    model: nn.Module,
    prompt: list[int],
    stop: set[int],
    device: torch.device,
    max_new_tokens: int = MAX_ANSWER_TOKENS,
    deadline: float = math.inf,
) -> tuple[list[int], str]:
    """Return the greedy continuation of `prompt` (token ids), without the stop token, and what cut
    it: the number of tokens, the model's positions, or the `deadline` (time.monotonic()) of rank 0;
    empty if it ended by itself. Every rank must call this with the same prompt.

    There is no cache of keys and values; causal attention makes the padding on the right harmless.
    """
    positions = getattr(text_config(model), "max_position_embeddings", None)
    if positions is not None:
        max_new_tokens = min(max_new_tokens, positions - len(prompt))
    if max_new_tokens < 1 or not prompt:
        return [], f"the prompt fills the model's {positions} positions" if prompt else ""
    model.eval()
    length = math.ceil((len(prompt) + max_new_tokens) / BUCKET) * BUCKET
    length = min(length, positions or length)
    tokens = torch.full((1, length), prompt[-1], dtype=torch.long, device=device)
    tokens[0, : len(prompt)] = torch.tensor(prompt, device=device)
    end, cut = len(prompt), f"after {plural(max_new_tokens, 'token')}"
    for position in range(len(prompt), len(prompt) + max_new_tokens):
        logits = model(input_ids=tokens, use_cache=False).logits
        choice = logits[0, position - 1].argmax()
        if time.monotonic() > deadline:
            choice.fill_(LATE)
        if dist.is_initialized():  # GPUs may round differently, and all must continue alike
            dist.broadcast(choice, src=0)
        chosen = int(choice)
        if chosen in stop or chosen == LATE:
            cut = f"answers may take {MAX_ANSWERS_S} s in all" if chosen == LATE else ""
            break
        tokens[0, position] = chosen
        end = position + 1
    model.train()
    reshard(model)
    answer: list[int] = tokens[0, len(prompt) : end].tolist()
    return answer, cut


def export(
    job: JobConfig,
    run: Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    write: ExportFunction,
) -> Exported:
    """Write output_dir/model, and the converted model if there is one, on rank 0."""
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
    """Return token ids [tokens] of the first held-out rows, or of training rows without those."""
    parts: list[NDArray[np.int32]] = []
    for sequence in data.eval or data.train:
        parts.append(sequence.input_ids)
        if sum(map(len, parts)) >= NUM_COMPARED:
            break
    return torch.from_numpy(np.concatenate(parts)[:NUM_COMPARED])


def evaluate_twins(state: TrainState, model: PreTrainedModel) -> None:
    """Evaluate the twins (the same job, trained before without a feature) in this run's model."""
    job = state.job
    for twin in state.transforms.twins() if state.held_out is not None else ():
        folder = Path(twin.output.output_dir) / "model"
        with state.run.phase("twin"):
            if job.transform(Lora).enabled:
                load_adapter(model, folder)
            else:
                source = {"model_name_or_path": str(folder), "train_from_scratch": False}
                trained = replace(job, model=job.model.model_copy(update=source))
                load_pretrained(model, trained, state.run.device)
            evaluate_variants(state, state.arithmetic.total_steps, of="twin")
