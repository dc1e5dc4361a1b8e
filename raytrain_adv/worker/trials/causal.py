"""Try before training whether a model sees later tokens, as an encoder does."""

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.dtensor import reshard
from raytrain_adv.errors import RaytrainAdvError, TrainingError
from raytrain_adv.model.parallel import compute_dtype
from raytrain_adv.run.run import Run
from raytrain_adv.text import of_error
from raytrain_adv.transforms.modules import class_name, short
from raytrain_adv.trial.compare import precision
from raytrain_adv.worker.trials.packing import quiet

LENGTH = 16
SEEN = {torch.float32: 1e-3, torch.bfloat16: 1e-2}
"""Largest change of earlier logits, as a share of the change of those that see it."""


@torch.no_grad()
def check_causal(job: JobConfig, model: PreTrainedModel, run: Run) -> None:
    """Refuse a model that sees the tokens it is trained to predict; all ranks call this once
    weights are loaded. Raises TrainingError on all ranks, if the second half of a row changes the
    logits of the first.
    """
    words = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(words, (LENGTH,), generator=generator)
    other = row.clone()
    other[LENGTH // 2 :] = (row[LENGTH // 2 :] + words // 2) % words
    with quiet(job, model):
        ids = torch.stack([row, other]).to(run.device)
        logits = _logits(job, model, ids)
    reshard(model)
    change = (logits[0] - logits[1]).abs().amax(-1)
    before, after = change[: LENGTH // 2], change[LENGTH // 2 :]
    share = float(before.max() / after.max().clamp(min=1e-30))
    sees = int(share > SEEN[compute_dtype(job)])  # not where a number is not finite
    if not run.agree(sees, dist.ReduceOp.MAX):
        return
    declares = "is_decoder" in model.config.to_dict()
    raise TrainingError(
        f"{short(class_name(model))} sees the tokens that it would be trained to predict",
        f"other tokens change the logits before them, by {share:.2g} of their own change"
        + ("; config.json has is_decoder: false" if declares else ""),
        "set is_decoder: true in its config.json, which makes its attention causal"
        if declares
        else "train a causal language model: one whose attention is masked to earlier tokens",
    )


def _logits(job: JobConfig, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the model's logits in float32; the first forward pass of a run. Raises TrainingError
    if the model's code fails, as xLSTM's does in bfloat16.
    """
    try:
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    except (RaytrainAdvError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model's own code may raise anything
        dtype = precision(compute_dtype(job))
        raise TrainingError(
            f"The forward pass of {short(class_name(model))} fails in {dtype}",
            of_error(error),
            "try it in transformers alone; if only one dtype fails, change bf16",
        ) from error
    return logits.float()
