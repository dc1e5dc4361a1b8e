"""Try before training whether a model computes the same if several workers share its sequences: one
whose layers mix tokens outside of its attention does not.
"""

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.batches.collate import Inputs, Way, part_of, told
from raytrain_adv.errors import TrainingError
from raytrain_adv.model.parallel import compute_dtype
from raytrain_adv.model.sequence_parallel import build_group, split_attention
from raytrain_adv.run.run import Run
from raytrain_adv.text import of_error
from raytrain_adv.trial.compare import allowed_errors, differences, relative_error
from raytrain_adv.worker.trials.collectives import host
from raytrain_adv.worker.trials.packing import GRADIENT, VALUES, logits_and_gradient, quiet

TOKENS = 32
"""Tokens of each worker; products in 8 bits take multiples of 16."""
FAILED = "sequence_parallel_failed"
"""Key in the ranks' store of the first failure."""
Results = tuple[torch.Tensor, torch.Tensor]
"""Logits [tokens, words], and the gradient of what is embedded [tokens, features]."""


def split_sequences(job: JobConfig, model: PreTrainedModel, run: Run, way: Way) -> str | None:
    """Make the model attend over the workers that share sequences, tried on it; return how, for the
    report. Every rank calls this once weights are loaded, and gradients are cleared. Raises
    TrainingError on all ranks, if logits or gradients are not those of a worker alone.
    """
    size = job.parallel.sequence_parallel_size
    if size == 1:
        return None
    if way in ("flat", "apart"):
        raise _refusal(model, size, "its recurrent layers go from token to token")
    group = build_group(size, run.device)
    with run.phase("try sequence parallelism"), quiet(job, model):
        row = _row(job, model, run, way)
        number = run.rank % size
        part = slice(number * TOKENS, (number + 1) * TOKENS)
        try:
            alone = _alone(model, row, part)
            noisy = _alone(model, row, part, torch.finfo(compute_dtype(job)).eps)
            split_attention(model, group, compute_dtype(job))
            own = part_of(row, part)
            logits, gradient = logits_and_gradient(model, own, slice(None), 0.0, number, size)
            noise, errors = _errors(noisy, alone), _errors((logits, gradient), alone)
            wrong = differences(errors, allowed_errors(noise, compute_dtype(job)))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # its layers may raise anything on new arguments
            raise _refusal(model, size, _first_reason(run, error)) from error
    lines = [f"rank {rank}: {'; '.join(one)}" for rank, one in enumerate(run.gather(wrong)) if one]
    if lines:
        raise _refusal(model, size, "\n".join(lines[:size]))
    hosts = run.gather(host())
    far = any(len(set(hosts[i : i + size])) > 1 for i in range(0, len(hosts), size))
    found = f"{size} workers {'of several hosts' if far else 'of a host'} share each sequence"
    run.say(f"{found}: logits and gradients are those of a worker alone", event="sequence_parallel")
    return found


def _first_reason(run: Run, error: Exception) -> str:
    """Return why the first rank failed. One that fails alone leaves at once, and others when it is
    gone: to tell them, it would wait for ranks that wait for it in an exchange.
    """
    reason = f"rank {run.rank}: {of_error(error)}"
    if run.world_size == 1:
        return reason
    first: bytes = dist.distributed_c10d._get_default_store().compare_set(FAILED, "", reason)
    return first.decode()


def _refusal(model: PreTrainedModel, size: int, found: str) -> TrainingError:
    return TrainingError(
        f"sequence_parallel_size: {size} would change what {type(model).__name__} computes",
        found,
        "set sequence_parallel_size: 1; layers other than attention, as recurrent ones, need all "
        "tokens of a sequence",
    )


def _row(job: JobConfig, model: PreTrainedModel, run: Run, way: Way) -> Inputs:
    """Return a row for all workers of a group, with neat_packing of two conversations."""
    length = TOKENS * job.parallel.sequence_parallel_size
    words = model.config.get_text_config().vocab_size
    first = length * 5 // 16 if job.data.neat_packing else 0
    ids = torch.randint(words, (1, length), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(first), torch.arange(length - first)])[None]
    row: Inputs = {"input_ids": ids}
    if first:
        row = told({"input_ids": ids, "position_ids": positions}, way)
    return {k: v.to(run.device) if isinstance(v, torch.Tensor) else v for k, v in row.items()}


def _alone(model: PreTrainedModel, row: Inputs, part: slice, noise: float = 0.0) -> Results:
    """Return what a worker alone computes, of a part of the row."""
    logits, gradient = logits_and_gradient(model, row, slice(None), noise)
    return logits[part], gradient[part]


def _errors(found: Results, alone: Results) -> dict[str, float]:
    """Return the relative errors of the tokens that are furthest off: a convolution, say, misses
    a few tokens of another worker, which changes few of this one's.
    """
    return {
        name: max(map(relative_error, ours, theirs))
        for name, ours, theirs in zip((VALUES, GRADIENT), found, alone, strict=True)
    }
