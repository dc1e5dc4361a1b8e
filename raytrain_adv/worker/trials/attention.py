"""Compare flash attention with its definition before training, in each form that layers use: a
kernel that leaves out the causal mask, or halves a gradient, trains without an error.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from raytrain_adv.config import JobConfig
from raytrain_adv.data.batches.collate import bounds
from raytrain_adv.errors import JobError
from raytrain_adv.model.attention import HUB, is_flash
from raytrain_adv.text import of_error, plural
from raytrain_adv.trial.compare import (
    allowed_errors,
    differences,
    precision,
    relative_error,
    relative_errors,
)

SEGMENTS = ((100, 500), (17, 500, 83))
"""Tokens of the conversations in each sequence of the trial, more than the blocks of kernels."""
WINDOW = 24  # tokens that one attends to in the trial if layers have a window
VALUES = "the values"
GRADIENTS = tuple(f"the gradient of {x}" for x in ("queries", "keys", "values"))


@dataclass(frozen=True)
class Form:
    """The attention of a layer."""

    heads: int
    key_heads: int
    features: int
    scaling: float
    has_window: bool
    softcap: float | None  # largest magnitude of a score; None for no bound
    value_features: int
    dropout: float

    def __str__(self) -> str:
        window = ", a sliding window" if self.has_window else ""
        softcap = f", scores capped at {self.softcap:g}" if self.softcap is not None else ""
        return f"{self.heads} heads of {self.features}, {self.key_heads} of keys{window}{softcap}"

    @property
    def remedy(self) -> str:
        """The key that computes it without a flash kernel."""
        return f"flash_attn: {'sdpa' if self.softcap is None else 'disabled'}"


def forms(model: PreTrainedModel) -> tuple[dict[Form, str], list[str]]:
    """Return a module for each form of attention in a model, and the classes of unknown form."""
    found: dict[Form, str] = {}
    unknown: set[str] = set()
    for fqn, module in model.named_modules():
        own: dict[str, Any] = vars(module)
        features = own.get("qk_head_dim", own.get("head_dim"))
        if features is None or not {"config", "scaling"} <= own.keys():
            parts = (p for p in module.modules() if "attention" in type(p).__name__.lower())
            if [*parts] == [module]:  # the innermost attention
                unknown.add(type(module).__name__)
            continue
        config = own["config"]
        heads = int(config.num_attention_heads)
        window = own.get("sliding_window", getattr(config, "sliding_window", None))
        form = Form(
            heads,
            heads // int(own.get("num_key_value_groups", 1)),
            int(features),
            float(own["scaling"]),
            window is not None,
            own.get("attn_logit_softcapping"),
            int(own.get("v_head_dim", features)),
            float(own.get("attention_dropout", 0.0)),
        )
        found.setdefault(form, fqn)
    return found, sorted(unknown)


def try_attention(
    job: JobConfig, model: PreTrainedModel, device: torch.device, dtype: torch.dtype
) -> str:
    """Compare the attention of a model, perhaps on the meta device, with attention's definition;
    return the result as a sentence, empty for PyTorch's own attention. Raises JobError when it
    computes something else, or has no gradient.
    """
    if not is_flash(model):
        return ""
    every, unknown = forms(model)
    if (unknown or not every) and job.model.flash_attn.startswith(HUB):
        raise JobError(
            f"flash_attn: {job.model.flash_attn} cannot be tested in this model",
            f"the form of attention of {', '.join(unknown) or type(model).__name__} is unknown, "
            "and a kernel that leaves some of it out would train all the same",
            "set flash_attn: sdpa",
        )
    left = f"; not tested in {', '.join(unknown)}, whose form is unknown" if unknown else ""
    if not every:
        return left.removeprefix("; ") or "not tested: no layer has a known form"
    errors = [
        _try(job, model, fqn, _Case(form, packed, device, dtype))
        for form, fqn in every.items()
        for packed in (False, True)
    ]
    if device.type == "cuda":
        torch.cuda.empty_cache()
    values = max(each.pop(VALUES) for each in errors)
    gradients = max(max(each.values()) for each in errors)
    return (
        f"tested on {device.type} in {precision(dtype)}, {plural(len(every), 'form')}: values "
        f"off by {values:.1e}, gradients by {gradients:.1e}{left}"
    )


def _try(job: JobConfig, model: PreTrainedModel, fqn: str, case: "_Case") -> dict[str, float]:
    """Return the errors of values and gradients in one case."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known: Any = ALL_ATTENTION_FUNCTIONS
    compute = known[model.config.get_text_config()._attn_implementation]
    module = model.get_submodule(fqn)
    kind, name = type(module).__name__, f"flash_attn: {job.model.flash_attn}"
    where = f"on {case.device.type} in {precision(case.dtype)}, {fqn} ({case})"
    fix = f"use another kernel or version, or set {case.form.remedy}"
    wrong_attention = f"{name} does not compute the attention of {kind}"
    try:
        found = case.run(compute, module)
    except torch.OutOfMemoryError:
        raise
    except _Wrong as error:
        raise JobError(wrong_attention, f"{where}: {error}", fix) from None
    except Exception as error:  # a kernel's code may raise anything
        raise JobError(
            f"{name} fails when {kind} calls it",
            f"{where}: {of_error(error)}",
            fix,
        ) from error
    if missing := [part for part, x in found.items() if x is None]:
        raise JobError(
            f"{name} has no gradient: it was made for inference",
            f"{where}: it would cut {' and '.join(missing)}",
            f"use a kernel with a backward pass, or set {case.form.remedy}",
        )
    exact = case.define(case.inputs())
    errors = relative_errors(found, exact)
    noise = relative_errors(case.define(case.inputs(noise=True)), exact)
    allowed = allowed_errors(noise, case.dtype)
    if wrong := differences(errors, allowed):
        if not errors[VALUES] <= allowed[VALUES]:
            for part, text in LEFT_OUT.items():
                other = case.define(case.inputs(), without=part)[VALUES]
                if relative_error(found[VALUES], other) <= allowed[VALUES]:
                    wrong.append(f"its values are those where {text}")
                    break
        raise JobError(wrong_attention, "\n".join([f"{where}:", *wrong]), fix)
    return errors


class _Wrong(Exception):
    """A way in which a kernel is wrong."""


LEFT_OUT = {
    "causal": "tokens see those that follow",
    "window": "the sliding window is left out",
    "softcap": "scores are not capped",
    "bounds": "packed conversations see each other",
}


@dataclass(frozen=True)
class _Case:
    """One comparison: a form, with whole sequences or with packed conversations."""

    form: Form
    packed: bool
    device: torch.device
    dtype: torch.dtype
    pull: torch.Tensor = field(init=False, compare=False)
    """Gradient of the values [sequences, time, heads, features]."""

    def __post_init__(self) -> None:
        shape = self._shape(self.form.heads, self.form.value_features)
        pull = self._random(1, shape).to(self.dtype).transpose(1, 2)
        object.__setattr__(self, "pull", pull)

    def __str__(self) -> str:
        return f"{self.form}), {'packed conversations' if self.packed else 'whole sequences'}"

    @staticmethod
    def _shape(heads: int, features: int) -> tuple[int, ...]:
        return (len(SEGMENTS), heads, sum(SEGMENTS[0]), features)

    def _random(self, seed: int, shape: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.device)

    def inputs(self, noise: bool = False) -> list[torch.Tensor]:
        """Return queries, keys and values [sequences, heads, time, features] whose scores are near
        1, or near enough to their cap to feel it; with noise, they are rounded once more.
        """
        form = self.form
        keys, values = (form.key_heads, form.features), (form.key_heads, form.value_features)
        sizes = [(form.heads, form.features), keys, values]
        inputs = [self._random(2 + n, self._shape(*size)) for n, size in enumerate(sizes)]
        reach = 1.0 if form.softcap is None else form.softcap / 4
        inputs[0] = inputs[0] * (reach / (form.scaling * math.sqrt(form.features)))
        inputs = [x.to(self.dtype) for x in inputs]
        if noise:
            eps = torch.finfo(self.dtype).eps
            shares = [self._random(9, tuple(x.shape)).clamp(-1, 1) for x in inputs]
            inputs = [x.float() * (1 + eps * s) for x, s in zip(inputs, shares, strict=True)]
        return [x.requires_grad_() for x in inputs]

    def options(self) -> dict[str, Any]:
        """Return the arguments that transformers passes with queries, keys and values."""
        form = self.form
        options: dict[str, Any] = {"dropout": 0.0, "scaling": form.scaling}
        options["sliding_window"] = WINDOW if form.has_window else None
        if form.softcap is not None:
            options["softcap"] = form.softcap
        if self.packed:
            positions = [[p for n in lengths for p in range(n)] for lengths in SEGMENTS]
            starts = bounds(torch.tensor(positions)).to(self.device)
            options |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), starts)
            options |= dict.fromkeys(("max_length_q", "max_length_k"), len(positions[0]))
        return options

    def run(self, compute: Any, module: nn.Module) -> dict[str, torch.Tensor | None]:
        """Return a kernel's values and gradients. Raises _Wrong when it overwrites its input,
        returns another dtype, or drops nothing.
        """
        inputs, options, dropout = self.inputs(), self.options(), self.form.dropout
        before = [x.detach().clone() for x in inputs]
        value, _ = compute(module, *inputs, None, **options)
        gradients: tuple[torch.Tensor | None, ...] = (None,) * len(inputs)
        if value.requires_grad:
            pull = self.pull.to(value.dtype)
            gradients = torch.autograd.grad(value, inputs, pull, allow_unused=True)
        dropped = None
        if dropout:
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.no_grad(), torch.random.fork_rng(devices):
                dropped, _ = compute(module, *inputs, None, **{**options, "dropout": dropout})
        if not all(map(torch.equal, before, inputs)):
            raise _Wrong("it overwrites queries, keys or values")
        if value.dtype != self.dtype:
            raise _Wrong(f"its values are {precision(value.dtype)}")
        if dropped is not None and torch.equal(dropped, value):
            raise _Wrong(f"it drops nothing, and attention_dropout is {dropout:g}")
        return {VALUES: value.detach(), **dict(zip(GRADIENTS, gradients, strict=True))}

    def define(self, inputs: list[torch.Tensor], without: str = "") -> dict[str, torch.Tensor]:
        """Return values and gradients by definition, in float32, `without` one of LEFT_OUT."""
        form = self.form
        exact = [x.detach().float().requires_grad_() for x in inputs]
        q, k, v = exact
        k, v = (x.repeat_interleave(form.heads // form.key_heads, dim=1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * form.scaling
        if form.softcap is not None and without != "softcap":
            scores = form.softcap * torch.tanh(scores / form.softcap)
        seen = self._seen(without).to(scores.device)
        weights = scores.masked_fill(~seen[:, None], -math.inf).softmax(dim=-1)
        value = (weights @ v).transpose(1, 2)
        gradients = torch.autograd.grad(value, exact, self.pull.float())
        return {VALUES: value.detach(), **dict(zip(GRADIENTS, gradients, strict=True))}

    def _seen(self, without: str) -> torch.Tensor:
        """Return whether a token attends to another: [sequences, time, time]."""
        time = torch.arange(sum(SEGMENTS[0]))
        back = time[:, None] - time
        seen = torch.ones_like(back, dtype=torch.bool) if without == "causal" else back >= 0
        if self.form.has_window and without != "window":
            seen = seen & (back < WINDOW)
        numbers = torch.stack(
            [torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in SEGMENTS]
        )
        same = numbers[:, :, None] == numbers[:, None, :]
        is_bounded = self.packed and without != "bounds"
        return seen & same if is_bounded else seen.expand_as(same)
