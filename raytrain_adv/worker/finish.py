"""After the last step: sample answers and the model folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.prepare import PreparedData
from raytrain_adv.run.run import Run
from raytrain_adv.worker.sample import greedy_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_ANSWER_TOKENS = 96

NUM_COMPARED = 1024
"""Tokens handed to the export, which compares on as many of them as it takes."""


@dataclass(frozen=True)
class Exported:
    """What a run leaves to be used, by the names of the report."""

    model_dir: str | None = None
    model_gib: float | None = None
    """Size on disk."""
    quantized_dir: str | None = None
    quantized_gib: float | None = None
    quantized_logit_difference: float | None = None
    """Largest difference between its logits and those of the model trained with fake quantization;
    rank 0 has it."""
    quantized_comparison: str = ""
    """On what and where they were compared."""


ExportFunction = Callable[
    [PreTrainedModel, JobConfig, Path, "PreTrainedTokenizerBase", torch.Tensor], Exported
]
"""Writes the model folder, or two; called on all ranks, with held-out token ids [tokens]. The
export package has it."""


def sample_answers(
    job: JobConfig,
    run: Run,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
) -> list[dict[str, str]]:
    """Return the model's answers to held-out prompts: {prompt, answer, reference}."""
    if job.output.num_sample_answers == 0:
        return []
    with run.phase("sample answers"):
        prompts = data.prompts(job.output.num_sample_answers, tokenizer)
        stop = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
        samples = []
        for ids, text, reference in prompts:
            answer = greedy_answer(model, list(ids), stop, run.device, MAX_ANSWER_TOKENS)
            decoded = tokenizer.decode(answer, skip_special_tokens=True)
            samples.append({"prompt": text, "answer": str(decoded), "reference": reference})
    return samples


def export(
    job: JobConfig,
    run: Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    write: ExportFunction,
) -> Exported:
    """Write output_dir/model, and the quantized model where there is one, on rank 0."""
    if not job.output.export_model:
        return Exported()
    out = Path(job.output.output_dir) / "model"
    with run.phase("export"):
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        exported = write(model, job, out, tokenizer, compared_tokens(data))
        run.barrier()
    return exported


def compared_tokens(data: PreparedData) -> torch.Tensor:
    """Return token ids [tokens] of the first held-out rows, one after another; of the training rows
    where none are held out.
    """
    parts: list[NDArray[np.int32]] = []
    for sequence in data.eval or data.train:
        parts.append(sequence.input_ids)
        if sum(map(len, parts)) >= NUM_COMPARED:
            break
    return torch.from_numpy(np.concatenate(parts)[:NUM_COMPARED])
