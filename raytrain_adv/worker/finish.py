"""After the last step: sample answers and the model folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.worker.data import PreparedData
from raytrain_adv.worker.run import Run
from raytrain_adv.worker.sample import greedy_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_ANSWER_TOKENS = 96

ExportFunction = Callable[[PreTrainedModel, JobConfig, Path, "PreTrainedTokenizerBase"], object]
"""Writes the model folder; called on all ranks. The export package has it."""


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
    write: ExportFunction,
) -> str:
    """Write output_dir/model on rank 0, gathered parameter by parameter; return its path."""
    out = Path(job.output.output_dir) / "model"
    with run.phase("export"):
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        write(model, job, out, tokenizer)
        run.barrier()
    return str(out)
