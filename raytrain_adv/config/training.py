"""The job keys of the optimization: batch, length, loss, optimizer, schedule, precision."""

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field

from raytrain_adv.config.problems import Problem
from raytrain_adv.config.section import Names, PathText, Section
from raytrain_adv.config.sections import LARGEST, Count, Share

SCHEDULE_OPTIONS = {
    "cosine": "num_cycles",
    "cosine_with_restarts": "num_cycles",
    "polynomial": "lr_end power",
    "inverse_sqrt": "timescale",
    "cosine_with_min_lr": "num_cycles min_lr min_lr_rate",
    "cosine_warmup_with_min_lr": "num_cycles min_lr min_lr_rate warmup_lr_rate",
    "warmup_stable_decay": "num_decay_steps num_stable_steps warmup_type decay_type min_lr_ratio "
    "num_cycles",
    "reduce_lr_on_plateau": "factor patience threshold threshold_mode cooldown min_lr eps",
    "greedy": "factor patience threshold threshold_mode cooldown warmup min_lr max_lr eps smooth "
    "window_size reset_start",
}
"""lr_scheduler_type -> its arguments in lr_scheduler_kwargs."""
FLOORED = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")
"""Schedules that need the learning rate they end at."""
ADAPTIVE = ("reduce_lr_on_plateau", "greedy")
"""Schedules that follow the held-out loss."""
WORDS = {
    "warmup_type": ("linear", "cosine", "1-sqrt"),
    "decay_type": ("linear", "cosine", "1-sqrt"),
    "threshold_mode": ("rel", "abs"),
}
"""Arguments that are words."""


KEYS_OF_LOSSES = {
    "eaft_alpha": "use_eaft_loss",
    "asft_alpha": "use_asft_loss",
    "distill_alpha": "use_distill_loss",
    "distill_model_name_or_path": "use_distill_loss",
}
OTHER_LOSSES = tuple(dict.fromkeys(["use_dft_loss", *KEYS_OF_LOSSES.values()]))
"""Keys of losses other than the plain cross-entropy; a run has one of them."""


class TrainConfig(Section):
    """The optimization: batch, length, optimizer, schedule, precision."""

    stage: Literal["sft", "pt"] = "sft"
    """Training stage: sft is supervised fine-tuning on conversations, pt pretraining on plain text,
    which is split into sequences of cutoff_len tokens and packed unless packing is false."""
    per_device_train_batch_size: Count = 8
    """Sequences per worker in one forward and backward pass."""
    per_device_eval_batch_size: Count = 8
    """Sequences per worker in one evaluation pass."""
    gradient_accumulation_steps: Count = 1
    """Forward and backward passes per optimizer step."""
    freeze_trainable_layers: (
        Annotated[int, Field(json_schema_extra={"not": {"const": 0}})] | None
    ) = None
    """Train this many layers only: the last ones, or of a negative number the first; null trains
    all. finetuning_type: freeze means 2."""
    freeze_trainable_modules: Names = "all"
    """Modules of these layers that are trained, as self_attn,mlp."""
    freeze_extra_modules: Names | None = None
    """Modules outside of the layers that are trained too, as embed_tokens,lm_head."""
    use_llama_pro: bool = False
    """LLaMA Pro: train the last layer of each of freeze_trainable_layers equal groups."""
    use_dft_loss: bool = False
    """Weigh each token's loss by the probability that the model gives it (DFT)."""
    use_eaft_loss: bool = False
    """Weigh each token's loss by the entropy of the model's 20 likeliest tokens (EAFT)."""
    eaft_alpha: Annotated[float, Field(ge=0.0)] = 1.0
    """Exponent of EAFT's weight."""
    use_asft_loss: bool = False
    """DFT, and asft_alpha times the divergence from the model before training (ASFT), which is kept
    as a second, frozen copy."""
    asft_alpha: Annotated[float, Field(ge=0.0)] = 0.1
    """Weight of ASFT's divergence."""
    use_distill_loss: bool = False
    """Train on the divergence from a teacher's tokens (distillation): by default the teacher is the
    model before training, without the job's features; it is kept as a second, frozen copy."""
    distill_alpha: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the divergence in the loss; the rest is the labels' cross-entropy."""
    distill_model_name_or_path: PathText | None = None
    """Folder of the teacher, with the same tokens, such as the model of a finished bf16 run; null
    means the model before training."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 5e-5
    """Peak learning rate."""
    num_train_epochs: Annotated[float, Field(gt=0.0, le=LARGEST)] = 3.0
    """Passes over the data; max_steps, when given, wins."""
    max_steps: Annotated[
        int, Field(ge=-1, le=LARGEST, json_schema_extra={"not": {"const": 0}})
    ] = -1
    """Optimizer steps in all; -1 derives them from num_train_epochs."""
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "warmup_stable_decay",
        "reduce_lr_on_plateau",
        "greedy",
    ] = "linear"
    """Shape of the learning rate over the run, as transformers computes it; the last two follow the
    held-out loss at each evaluation."""
    lr_scheduler_kwargs: dict[str, bool | int | float | str] = Field(default={})
    """Arguments of the schedule, as {min_lr_rate: 0.1} of cosine_with_min_lr or {num_decay_steps:
    100, min_lr_ratio: 0.1} of warmup_stable_decay."""
    warmup_ratio: Share | None = None
    """Share of the steps over which the learning rate rises from 0; excludes warmup_steps."""
    warmup_steps: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    """Steps over which the learning rate rises from 0."""
    optim: Literal["adamw_torch_fused", "adamw_torch", "adamw_torch_8bit", "muon"] = (
        "adamw_torch_fused"
    )
    """AdamW: PyTorch's fused or plain form, or torchao's with 8-bit states; muon is PyTorch's Muon
    for the matrices inside the layers, and AdamW for all other parameters."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay; not applied to biases and norms."""
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay of the gradient's running mean."""
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    """Decay of the squared gradient's running mean."""
    adam_epsilon: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the denominator of the update."""
    max_grad_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """Gradients are scaled so that their global norm is at most this; 0 turns clipping off."""
    on_bad_loss: Literal["stop", "skip"] = "stop"
    """After a step whose loss or gradient norm is NaN or infinite, or whose loss exceeds
    bad_loss_factor: stop ends the run and keeps its checkpoints; skip omits that update,
    reports and counts it, and ends the run after ten in a row. Checking each step before its update
    waits for the GPU. The batch is kept in output_dir/bad_batches."""
    bad_loss_factor: Annotated[float, Field(gt=1.0)] | None = None
    """A loss above this many times the median of the previous 20 steps is bad too; null means that
    only NaN and infinity are."""
    bf16: bool = False
    """Compute in bfloat16 with parameters and optimizer states in float32."""
    pure_bf16: bool = False
    """Keep parameters and optimizer states in bfloat16 too: 8 bytes a parameter instead of 16, and
    updates below 0.2 % of a weight are lost to rounding."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 42
    """Seed of the data order, dropout and new weights."""

    @property
    def weighs_tokens(self) -> bool:
        """Whether the training loss is not the cross-entropy."""
        return any(getattr(self, key) for key in OTHER_LOSSES)

    @property
    def compares_with_reference(self) -> bool:
        """Whether the training loss needs a second, frozen model."""
        return self.use_asft_loss or self.use_distill_loss

    @property
    def computes_in_bf16(self) -> bool:
        """Whether products are in bfloat16, whatever parameters are kept in."""
        return self.bf16 or self.pure_bf16

    def contradictions(self) -> Iterable[Problem]:
        """Find training keys that contradict each other."""
        if self.warmup_ratio is not None and self.warmup_steps:
            text = "two lengths of one warm-up"
            yield Problem(text, "keep one of them", "warmup_ratio and warmup_steps")
        warmup = "warmup_ratio" if self.warmup_ratio else "warmup_steps"
        if self.lr_scheduler_type in ("constant", *ADAPTIVE) and getattr(self, warmup):
            fix = f"set lr_scheduler_type: constant_with_warmup, or delete {warmup}"
            text = f"{self.lr_scheduler_type} has no warm-up"
            yield Problem(text, fix, f"lr_scheduler_type and {warmup}")
        if self.max_steps == 0:
            fix = "give at least 1, or -1 to derive it from num_train_epochs"
            yield Problem("0 steps train nothing", fix, "max_steps")
        losses = [key for key in OTHER_LOSSES if getattr(self, key)]
        if len(losses) > 1:
            yield Problem("a run has one loss", "keep one of them", " and ".join(losses))
        if self.freeze_trainable_layers == 0:
            yield Problem("0 layers", "give a number of layers", "freeze_trainable_layers")
        for key in ("freeze_trainable_modules", "freeze_extra_modules", "use_llama_pro"):
            if self.freeze_trainable_layers is None and self.is_changed(key):
                text = "no layers are frozen"
                fix = "set freeze_trainable_layers too, or delete it"
                yield Problem(text, fix, f"{key} and freeze_trainable_layers")
        for key, loss in KEYS_OF_LOSSES.items():
            if self.is_changed(key) and not getattr(self, loss):
                yield Problem(
                    f"{loss} is off", f"set {loss}: true, or delete it", f"{key} and {loss}"
                )
        yield from self._schedule_contradictions()

    def _schedule_contradictions(self) -> Iterable[Problem]:
        kind, options = self.lr_scheduler_type, self.lr_scheduler_kwargs
        pair = "lr_scheduler_kwargs and lr_scheduler_type"
        taken = SCHEDULE_OPTIONS.get(kind, "").split()
        fix = f"{kind} takes {', '.join(taken)}" if taken else f"delete it: {kind} takes none"
        wrong = [name for name in options if name not in taken]
        for name in wrong:
            yield Problem(f"{kind} has no argument {name}", fix, pair)
        if kind in FLOORED and len(options.keys() & {"min_lr", "min_lr_rate"}) != 1:
            text = f"{kind} takes one of min_lr and min_lr_rate"
            yield Problem(text, "set lr_scheduler_kwargs: {min_lr_rate: 0.1}", pair)
        yield from self._wrong_options(options)

    def _wrong_options(self, options: dict[str, Any]) -> Iterable[Problem]:
        key = "lr_scheduler_kwargs"
        for name, value in options.items():
            if isinstance(value, int | float) and value < 0:
                yield Problem(f"{name}: {value} is below 0", "give a number from 0", key)
            elif name in ("min_lr", "lr_end") and isinstance(value, int | float):
                if value > self.learning_rate:
                    text = f"{name} {value} is above learning_rate {self.learning_rate}"
                    yield Problem(text, f"give a {name} below it", f"{key} and learning_rate")
            elif name in ("min_lr_rate", "min_lr_ratio") and not 0 <= _number(value) <= 1:
                yield Problem(f"{name}: {value} is not a share", "give a share from 0 to 1", key)
            elif name.endswith("_steps") and _number(value) % 1 != 0:
                yield Problem(f"{name} is not a whole number", "give a number of steps", key)
            elif name in WORDS and value not in WORDS[name]:
                text = f"{name}: {value} is not one of its words"
                yield Problem(text, f"give one of {', '.join(WORDS[name])}", key)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
