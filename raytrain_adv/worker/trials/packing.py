"""Try before training whether this model keeps packed conversations apart: one that carries a state
from token to token, or makes its masks without position ids, mixes them without an error.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.batches.collate import Inputs, Way, told
from raytrain_adv.errors import TrainingError
from raytrain_adv.model.apart import Apart, Mixing
from raytrain_adv.model.attention import is_flash
from raytrain_adv.model.packing import hand_masks
from raytrain_adv.model.parallel import compute_dtype
from raytrain_adv.run.run import Run
from raytrain_adv.text import of_error
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.trial.compare import TOLERANCE, allowed_errors, differences, relative_error

LENGTHS = (20, 44)
"""Tokens of the two conversations: together a multiple of 16, apart none of 8."""
SEEN = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
"""Largest change, as a share, that another conversation's tokens may make: the same operations on
the same numbers, which only kernels that add in another order each time change."""
VALUES, GRADIENT = "logits", "gradient"
WAIT_S = 60.0
"""Wait of a rank that failed for the others, which wait for it in a collective if it did alone."""
FIX = (
    "set packing: false and neat_packing: false (rows are then padded), or only neat_packing: "
    "false if conversations may see each other"
)


def check_packing(job: JobConfig, model: PreTrainedModel, run: Run) -> Way:
    """Return how the model is told where packed conversations begin, tried on it; every rank calls
    this once weights are loaded, and gradients are cleared. Raises TrainingError on all ranks, if
    in no way its conversations are kept apart.
    """
    first: Way = "bounds" if is_flash(model) else "positions"
    if not job.data.neat_packing:
        return first
    lines: list[str] = []
    with run.phase("try packing"), quiet(job, model):
        for way in _ways(model, first):
            wrong = _wrong(job, model, run, way)
            if not wrong:
                run.say(f"packed conversations are kept apart by {MEANS[way]}: tried", event="data")
                return way
            lines += [f"by {MEANS[way]}: {'; '.join(wrong)}"]
    raise TrainingError(
        f"neat_packing: packed conversations would change each other in {type(model).__name__}",
        "\n".join([*lines, *_missing(model)]),
        FIX,
    )


MEANS: dict[Way, str] = {
    "positions": "position ids",
    "masks": "masks made for it",
    "bounds": "the bounds that flash attention takes",
    "flat": "the bounds that recurrent layers take",
    "apart": "calling layers once for each; recurrent ones are faster with kernels that take "
    "bounds (flash-linear-attention, mamba_ssm, causal_conv1d)",
}


def _ways(model: PreTrainedModel, first: Way) -> Iterator[Way]:
    """Yield what may be tried with this model's forward pass."""
    accepted = inspect.signature(type(model).forward).parameters
    if _takes_positions(model):
        yield first
        if first == "positions" and "attention_mask" in accepted:
            yield "masks"
    if any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        yield "flat"
    yield "apart"


def _takes_positions(model: PreTrainedModel) -> bool:
    """Whether a model's forward pass takes position_ids, or passes on what it does not know."""
    accepted = inspect.signature(type(model).forward).parameters
    return "position_ids" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values())


def _missing(model: PreTrainedModel) -> Iterator[str]:
    """Yield what a model lacks: the argument that others have, and packages that would help."""
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        yield "its forward pass takes no position_ids: it cannot be told where conversations begin"


@contextmanager
def eager_eval(model: nn.Module) -> Iterator[None]:
    """Turn dropout and compilation off inside; drop gradients afterward."""
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        yield
    model.train()
    model.zero_grad(set_to_none=True)


@contextmanager
def quiet(job: JobConfig, model: PreTrainedModel) -> Iterator[None]:
    """Turn dropout, compilation and features off inside; drop gradients afterward."""
    Transforms(job).switch(model, False)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with eager_eval(model), torch.random.fork_rng(devices):
        yield


def _wrong(job: JobConfig, model: PreTrainedModel, run: Run, way: Way) -> list[str]:
    """Return how the second conversation differs on a rank if it is told so; empty if on none."""
    handle: RemovableHandle | Apart | None = None
    most_s = None
    try:
        if way == "masks":
            handle = hand_masks(model, compute_dtype(job))
        if way == "apart":
            handle = _split(job, model, run)
        wrong = _compare(_Rows(model, run.device, way), compute_dtype(job))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 # its layers may raise anything on new arguments
        wrong, most_s = [of_error(error)], WAIT_S
    try:
        any_wrong = run.agree(int(bool(wrong)), dist.ReduceOp.MAX, most_s)
    except RuntimeError as error:
        if most_s is None:
            raise
        raise TrainingError(
            f"Packed conversations could not be tried: rank {run.rank} failed alone",
            f"{'; '.join(wrong)}; no other rank failed within {most_s:g} s",
            FIX,
        ) from error
    if handle is not None and any_wrong:
        handle.remove()
    return wrong or ["on another rank; see its error"] * any_wrong


def _split(job: JobConfig, model: PreTrainedModel, run: Run) -> Apart:
    """Call the modules that mix two conversations once for each."""
    apart = Apart(model, _takes_positions(model))
    spans, dtype = [(0, LENGTHS[0]), (LENGTHS[0], sum(LENGTHS))], compute_dtype(job)
    rows = _Rows(model, run.device, "apart")
    with Mixing(model, spans, SEEN[dtype], TOLERANCE[dtype]) as mixing, torch.no_grad():
        model(**rows.inputs([*rows.tokens()[:2]]), use_cache=False)
    for module in mixing.chosen():
        apart.add(module)
    return apart


def _compare(rows: "_Rows", dtype: torch.dtype) -> list[str]:
    first, second, other = rows.tokens()
    packed, behind = rows.run([first, second], 1)
    changed, _ = rows.run([other, second], 1)
    alone, _ = replace(rows, way=None).run([second], 0)
    noisy, _ = replace(rows, way=None).run([second], 0, noise=torch.finfo(dtype).eps)
    seen = {
        VALUES: relative_error(changed[VALUES], packed[VALUES]),
        GRADIENT: float(behind.norm() / packed[GRADIENT].norm().clamp(min=1e-30)),
    }
    lines = [
        f"its {name} changes by {share:.2g} with another conversation"
        for name, share in seen.items()
        if not share <= SEEN[dtype]
    ]
    errors = {name: relative_error(packed[name], alone[name]) for name in alone}
    noise = {name: relative_error(noisy[name], alone[name]) for name in alone}
    return lines + [f"{x} from alone" for x in differences(errors, allowed_errors(noise, dtype))]


@dataclass(frozen=True)
class _Rows:
    """Rows of conversations through a model, which is told of their bounds in a way."""

    model: PreTrainedModel
    device: torch.device
    way: Way | None
    """None tells it nothing, as without packing: a model may count positions otherwise."""

    def tokens(self) -> tuple[torch.Tensor, ...]:
        """Return two conversations, and another one of the first's length, without padding."""
        config = self.model.config.get_text_config()
        generator = torch.Generator().manual_seed(0)
        lengths, words = (*LENGTHS, LENGTHS[0]), config.vocab_size
        drawn = [torch.randint(words, (n,), generator=generator) for n in lengths]
        pad = getattr(config, "pad_token_id", None)
        if pad is None:
            return tuple(drawn)
        return tuple(torch.where(one == pad, (one + 1) % words, one) for one in drawn)

    def inputs(self, conversations: list[torch.Tensor]) -> Inputs:
        """Return the conversations as one row of all LENGTHS, padded by one of a single token."""
        rest = sum(LENGTHS) - sum(map(len, conversations))
        parts = [*conversations, torch.zeros(rest, dtype=torch.int64)]
        positions = torch.cat([torch.arange(len(part)) for part in parts])
        tensors = {"input_ids": torch.cat(parts)[None], "position_ids": positions[None]}
        inputs: Inputs = {"input_ids": tensors["input_ids"]}
        if self.way is not None:
            inputs = told(tensors, self.way)
        return {
            k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()
        }

    def run(
        self, conversations: list[torch.Tensor], which: int, noise: float = 0.0
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return a conversation's logits [tokens, words] and the gradient of its embedded tokens,
        and the gradient that reaches those before it; with noise in what is embedded.
        """
        start = sum(map(len, conversations[:which]))
        own = slice(start, start + len(conversations[which]))
        inputs = self.inputs(conversations)
        logits, gradient = logits_and_gradient(self.model, inputs, own, noise)
        return {VALUES: logits, GRADIENT: gradient[own]}, gradient[:start]


def logits_and_gradient(
    model: PreTrainedModel,
    inputs: Inputs,
    own: slice,
    noise: float = 0.0,
    part: int = 0,
    parts: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits [tokens, words] of a row's `own` tokens, and the gradient [all tokens,
    features] of what is embedded when they are pulled at random, as a part of several; with noise
    in what is embedded.
    """
    embedded: list[torch.Tensor] = []

    def keep(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        if noise:
            generator = torch.Generator().manual_seed(1)
            share = 2 * torch.rand(output.shape, generator=generator).to(output.device) - 1
            output = (output * (1 + noise * share)).to(output.dtype)
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        output.retain_grad()
        embedded.append(output)
        return output

    untyped: Any = model  # transformers has no types here
    hook = untyped.get_input_embeddings().register_forward_hook(keep)
    try:
        logits = model(**inputs, use_cache=False).logits[0, own]
    finally:
        hook.remove()
    shape = (parts * logits.shape[0], logits.shape[1])
    pull = torch.randn(shape, generator=torch.Generator().manual_seed(2)).chunk(parts)[part]
    (logits.float() * pull.to(logits.device)).sum().backward()
    reached = embedded[0].grad
    if reached is None:
        raise ValueError("no gradient reaches the input embeddings")
    gradient = reached.flatten(0, -2).float()
    model.zero_grad(set_to_none=True)
    return logits.detach(), gradient
