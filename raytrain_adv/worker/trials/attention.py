"""Flash attention tried out before it is trusted with training: values and gradients against
attention's definition, in each form that the model's layers ask for.

A kernel that leaves out the causal mask, or halves a gradient, trains without an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from raytrain_adv.config import JobConfig
from raytrain_adv.data.batches.collate import bounds
from raytrain_adv.errors import JobError
from raytrain_adv.model.attention import HUB, is_flash
from raytrain_adv.trial.module import TOLERANCE

SEGMENTS = ((100, 500), (17, 500, 83))
"""Tokens of the conversations in each sequence of the trial, more than the blocks that kernels cut
them into."""
WINDOW = 24
"""Tokens that one sees in the trial where layers have a window, which is shorter than SEGMENTS."""
NAMES = ("the values", "the gradient of queries", "the gradient of keys", "the gradient of values")


@dataclass(frozen=True)
class Form:
    """What a layer asks of attention."""

    heads: int
    key_heads: int
    features: int
    """Of each head."""
    scaling: float
    has_window: bool
    softcap: float | None
    """Largest magnitude of a score; none is not bounded."""
    value_features: int
    """Of each head of values."""
    dropout: float
    """Share of the weights that is dropped in training."""

    def __str__(self) -> str:
        window = ", a sliding window" if self.has_window else ""
        softcap = f", scores capped at {self.softcap:g}" if self.softcap is not None else ""
        return f"{self.heads} heads of {self.features}, {self.key_heads} of keys{window}{softcap}"

    @property
    def remedy(self) -> str:
        """What computes it in any case."""
        return f"flash_attn: {'sdpa' if self.softcap is None else 'disabled'}"


def forms(model: PreTrainedModel) -> tuple[dict[Form, str], list[str]]:
    """Return the forms that a model's layers ask for, each with a module that does, and the classes
    of attention whose form is not known.
    """
    found: dict[Form, str] = {}
    unknown: set[str] = set()
    for fqn, module in model.named_modules():
        own: dict[str, Any] = vars(module)
        features = own.get("qk_head_dim", own.get("head_dim"))
        if features is None or not {"config", "scaling"} <= own.keys():
            if _is_innermost_attention(module):
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


def _is_innermost_attention(module: torch.nn.Module) -> bool:
    named = [part for part in module.modules() if "attention" in type(part).__name__.lower()]
    return named == [module]


def try_attention(
    job: JobConfig, model: PreTrainedModel, device: torch.device, dtype: torch.dtype
) -> str:
    """Hold the model's flash attention to attention's definition; return what was found, and an
    empty text where attention is PyTorch's own.

    Args:
        job: the resolved job.
        model: it may be on the meta device.
        device: where this worker computes.
        dtype: of queries, keys and values.

    Raises:
        JobError: when it computes something else, or has no gradient.
    """
    if not is_flash(model):
        return ""
    every, unknown = forms(model)
    if (unknown or not every) and job.model.flash_attn.startswith(HUB):
        raise JobError(
            f"flash_attn: {job.model.flash_attn} cannot be tried out in this model",
            f"what {', '.join(unknown) or type(model).__name__} asks of attention is not known, "
            "and a kernel that leaves some of it out would train all the same",
            "set flash_attn: sdpa",
        )
    left = f"; not tried out in {', '.join(unknown)}, whose form is not known" if unknown else ""
    if not every:
        return left.removeprefix("; ") or "not tried out: no layer is of a form that is known"
    errors = [_tried(job, model, form, fqn, device, dtype) for form, fqn in every.items()]
    if device.type == "cuda":
        torch.cuda.empty_cache()
    values, gradients = max(e[0] for e in errors), max(max(e[1:]) for e in errors)
    return (
        f"tried out on {device.type} in {_plain(dtype)}, {len(every)} "
        f"{'form' if len(every) == 1 else 'forms'}: values off by {values:.1e}, gradients by "
        f"{gradients:.1e}{left}"
    )


def _tried(
    job: JobConfig,
    model: PreTrainedModel,
    form: Form,
    fqn: str,
    device: torch.device,
    dtype: torch.dtype,
) -> list[float]:
    """Return the largest errors of one form, by NAMES."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known: Any = ALL_ATTENTION_FUNCTIONS
    compute = known[model.config._attn_implementation]
    module = model.get_submodule(fqn)
    asked = f"flash_attn: {job.model.flash_attn}"
    worst = [0.0] * len(NAMES)
    for packed in (False, True):
        inputs = _inputs(form, device, dtype)
        shape = (*_shape(form, form.heads)[:-1], form.value_features)
        pull = _numbers(1, shape, device, dtype).transpose(1, 2)
        where = (
            f"on {device.type} in {_plain(dtype)}, {fqn} ({form}), "
            f"{'packed conversations' if packed else 'whole sequences'}"
        )
        try:
            found = _found(form, compute, module, inputs, pull, packed)
        except torch.OutOfMemoryError:
            raise
        except _Wrong as error:
            raise _refusal(asked, module, f"{where}: {error}", form) from None
        except Exception as error:  # whatever a stranger's code raises, it is said and ends the run
            first = next(iter(str(error).strip().splitlines()), "")
            raise JobError(
                f"{asked} fails where {type(module).__name__} calls it",
                f"{where}: {type(error).__name__}: {first}",
                f"take another kernel or version, or set {form.remedy}",
            ) from error
        if missing := [n for n, x in zip(NAMES, found, strict=True) if x is None]:
            raise JobError(
                f"{asked} has no gradient: it was made for inference",
                f"{where}: it would cut {' and '.join(missing)}",
                f"take a kernel with a backward pass, or set {form.remedy}",
            )
        errors, wrong = _compared(form, [x for x in found if x is not None], inputs, pull, packed)
        if wrong:
            raise _refusal(asked, module, "\n".join([f"{where}:", *wrong]), form)
        worst = [max(pair) for pair in zip(worst, errors, strict=True)]
    return worst


class _Wrong(Exception):
    """What a kernel does that attention does not."""


def _found(
    form: Form,
    compute: Any,
    module: torch.nn.Module,
    inputs: list[torch.Tensor],
    pull: torch.Tensor,
    packed: bool,
) -> list[torch.Tensor | None]:
    """Return the kernel's values and gradients, by NAMES.

    Raises:
        _Wrong: when it writes over its input, returns another dtype, or drops nothing.
    """
    before = [x.detach().clone() for x in inputs]
    options = _options(form, packed, inputs[0].device)
    value, _ = compute(module, *inputs, None, **options)
    gradients = _gradients(value, inputs, pull)
    dropped = _dropped(form, compute, module, inputs, options)
    if not all(map(torch.equal, before, inputs)):
        raise _Wrong("it writes over queries, keys or values")
    if value.dtype != inputs[0].dtype:
        raise _Wrong(f"its values are {_plain(value.dtype)}")
    if dropped is not None and torch.equal(dropped, value):
        raise _Wrong(f"it drops nothing, and attention_dropout is {form.dropout:g}")
    return [value.detach(), *gradients]


def _compared(
    form: Form,
    found: list[torch.Tensor],
    inputs: list[torch.Tensor],
    pull: torch.Tensor,
    packed: bool,
) -> tuple[list[float], list[str]]:
    """Return the errors, by NAMES, and what of them rounding does not explain."""
    device, dtype = inputs[0].device, inputs[0].dtype
    exact = _defined(form, inputs, pull, packed)
    noisy = _defined(form, _inputs(form, device, dtype, noise=True), pull, packed)
    errors = [_apart(x, y) for x, y in zip(found, exact, strict=True)]
    allowed = [TOLERANCE[dtype] + _apart(x, y) for x, y in zip(noisy, exact, strict=True)]
    wrong = [
        f"{name} off by {error:.2g}, of which rounding explains {most:.2g}"
        for name, error, most in zip(NAMES, errors, allowed, strict=True)
        if not error <= most
    ]
    if errors[0] > allowed[0]:
        wrong.append(_looks_like(form, inputs, pull, packed, found[0], allowed[0]))
    return errors, [line for line in wrong if line]


@torch.no_grad()
def _dropped(
    form: Form,
    compute: Any,
    module: torch.nn.Module,
    inputs: list[torch.Tensor],
    options: dict[str, Any],
) -> torch.Tensor | None:
    """Return values with the dropout of training; none where there is none."""
    if not form.dropout:
        return None
    devices = [inputs[0].device] if inputs[0].is_cuda else []
    with torch.random.fork_rng(devices):
        value, _ = compute(module, *inputs, None, **{**options, "dropout": form.dropout})
    dropped: torch.Tensor = value
    return dropped


def _options(form: Form, packed: bool, device: torch.device) -> dict[str, Any]:
    """Return what transformers passes beside queries, keys and values."""
    options: dict[str, Any] = {"dropout": 0.0, "scaling": form.scaling}
    options["sliding_window"] = WINDOW if form.has_window else None
    if form.softcap is not None:
        options["softcap"] = form.softcap
    if packed:
        positions = [[p for n in lengths for p in range(n)] for lengths in SEGMENTS]
        starts = bounds(torch.tensor(positions)).to(device)
        longest = len(positions[0])
        options |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
        options |= {"max_length_q": longest, "max_length_k": longest}
    return options


def _defined(
    form: Form,
    inputs: list[torch.Tensor],
    pull: torch.Tensor,
    packed: bool,
    without: str = "",
) -> list[torch.Tensor]:
    """Return attention's values and gradients by its definition, computed in float32.

    Args:
        form: what is asked for.
        inputs: queries, keys and values [sequences, heads, time, features].
        pull: gradient of the values [sequences, time, heads, features].
        packed: whether conversations see themselves alone.
        without: one of LEFT_OUT.
    """
    exact = [x.detach().float().requires_grad_() for x in inputs]
    q, k, v = exact
    share = form.heads // form.key_heads
    k, v = (x.repeat_interleave(share, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * form.scaling
    if form.softcap is not None and without != "softcap":
        scores = form.softcap * torch.tanh(scores / form.softcap)
    seen = _seen(form, packed, without).to(scores.device)
    weights = scores.masked_fill(~seen[:, None], -math.inf).softmax(dim=-1)
    value = (weights @ v).transpose(1, 2)
    gradients = torch.autograd.grad(value, exact, pull.float())
    return [value.detach(), *gradients]


LEFT_OUT = {
    "causal": "tokens see those that follow",
    "window": "the sliding window is left out",
    "softcap": "scores are not capped",
    "bounds": "packed conversations see each other",
}


def _seen(form: Form, packed: bool, without: str) -> torch.Tensor:
    """Return whether a token sees another: [sequences, time, time]."""
    time = torch.arange(sum(SEGMENTS[0]))
    back = time[:, None] - time
    seen = torch.ones_like(back, dtype=torch.bool) if without == "causal" else back >= 0
    if form.has_window and without != "window":
        seen = seen & (back < WINDOW)
    numbers = torch.stack(
        [torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in SEGMENTS]
    )
    same = numbers[:, :, None] == numbers[:, None, :]
    return seen & same if packed and without != "bounds" else seen.expand_as(same)


def _looks_like(
    form: Form,
    inputs: list[torch.Tensor],
    pull: torch.Tensor,
    packed: bool,
    value: torch.Tensor,
    allowed: float,
) -> str:
    """Say what the kernel seems to leave out; empty where it is none of what is known."""
    for name, text in LEFT_OUT.items():
        other = _defined(form, inputs, pull, packed, without=name)
        if _apart(value, other[0]) <= allowed:
            return f"its values are those where {text}"
    return ""


def _gradients(
    value: torch.Tensor, inputs: list[torch.Tensor], pull: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    if not value.requires_grad:
        return (None,) * len(inputs)
    return torch.autograd.grad(value, inputs, pull.to(value.dtype), allow_unused=True)


def _inputs(
    form: Form, device: torch.device, dtype: torch.dtype, noise: bool = False
) -> list[torch.Tensor]:
    """Return queries, keys and values whose scores are near 1, or near enough to their cap to feel
    it.
    """
    shapes = [_shape(form, heads) for heads in (form.heads, form.key_heads, form.key_heads)]
    shapes[2] = (*shapes[2][:-1], form.value_features)
    inputs = [_numbers(2 + n, shape, device, torch.float32) for n, shape in enumerate(shapes)]
    reach = 1.0 if form.softcap is None else form.softcap / 4
    inputs[0] = inputs[0] * (reach / (form.scaling * math.sqrt(form.features)))
    inputs = [x.to(dtype) for x in inputs]
    if noise:
        eps = torch.finfo(dtype).eps
        shares = [_numbers(9, x.shape, device, torch.float32).clamp(-1, 1) for x in inputs]
        inputs = [x.float() * (1 + eps * share) for x, share in zip(inputs, shares, strict=True)]
    return [x.requires_grad_() for x in inputs]


def _shape(form: Form, heads: int) -> tuple[int, ...]:
    return (len(SEGMENTS), heads, sum(SEGMENTS[0]), form.features)


def _numbers(
    seed: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def _apart(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return how far apart two tensors are, relative in norm; infinite where they cannot be held
    to each other, or are not finite.
    """
    if found.shape != exact.shape:
        return math.inf
    error = float((found.float() - exact).norm() / exact.norm())
    return error if math.isfinite(error) else math.inf


def _refusal(asked: str, module: torch.nn.Module, found: str, form: Form) -> JobError:
    return JobError(
        f"{asked} does not compute the attention that {type(module).__name__} asks for",
        found,
        f"take another kernel or version, or set {form.remedy}",
    )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
