"""Noise on embeddings, scaled by the length of each conversation."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from raytrain_adv.dtensor import seed_of
from raytrain_adv.errors import TrainingError

NOISE = "raytrain_adv::neftune_noise"  # what a profile of a training step calls it
OFF = "delete neftune_noise_alpha"
PROBED = ((24,), (8, 12))
"""Tokens of the conversations in the two rows of the trial, 32 places each."""
PROBED_LENGTH, PROBED_ROWS = 32, 4
Segments = tuple[tuple[int, ...], ...]
"""Of each sequence of a batch the tokens of the conversations in it; padding follows."""


@dataclass(eq=False)
class Noise:
    """A forward hook that adds a training batch's noise to its embeddings.

    The noise of a conversation is a function of the seed, the optimizer step, and its place among
    all sequences of the step: it does not depend on workers and accumulation, nor on what was drawn
    before a run was resumed, and changes no other random values.
    """

    alpha: float
    seed: int = 0
    step: int = 0
    first: int = 0
    segments: Segments = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Return the embeddings [sequences, time, features] with noise, in training."""
        if not module.training:
            return output
        rows, time = output.shape[:2]
        if rows != len(self.segments) or any(sum(s) > time for s in self.segments):
            raise TrainingError(
                "NEFTune got another batch than it was prepared for",
                f"{rows} sequences of {time} tokens; expected {[sum(s) for s in self.segments]}",
                f"this is a defect of raytrain_adv; {OFF} to train without it",
            )
        with torch.profiler.record_function(NOISE):
            return output + self.made_for(output)

    def made_for(self, output: Tensor) -> Tensor:
        """Return the noise for embeddings of this shape, device and dtype."""
        noise = torch.zeros_like(output, requires_grad=False)
        generator = torch.Generator(output.device)
        width = output.shape[2]
        for row, number, tokens, length in _conversations(self.segments):
            place = f"neftune/{self.step}/{self.first + row}/{number}"
            generator.manual_seed(seed_of(self.seed, place))
            part = torch.empty(length, width, device=output.device)
            bound = _bound(self.alpha, length, width)
            noise[row, tokens] = part.uniform_(-bound, bound, generator=generator)
        return noise


def _bound(alpha: float, length: int, width: int) -> float:
    return alpha / math.sqrt(length * width)


def _conversations(segments: Segments) -> Iterator[tuple[int, int, slice, int]]:
    """Yield each conversation's row, number in it, tokens, and how many these are."""
    for row, lengths in enumerate(segments):
        for number, (end, length) in enumerate(zip(accumulate(lengths), lengths, strict=True)):
            yield row, number, slice(end - length, end), length


def noise_of(module: nn.Module) -> Noise | None:
    """Return the hook of a module that adds noise."""
    hooks = module._forward_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, Noise)), None)


def noises(model: nn.Module) -> Iterator[Noise]:
    """Yield a model's hooks that add noise."""
    yield from filter(None, map(noise_of, model.modules()))


def measure(embedding: nn.Module, alpha: float, device: torch.device, dtype: torch.dtype) -> str:
    """Check an embedding's noise, of size alpha, on a table of zeros; return the result in words.
    Raises TrainingError when it is wrong.
    """
    width = int(embedding.embedding_dim)  # type: ignore[arg-type] # planned as an embedding
    table = nn.Embedding(PROBED_ROWS, width, device=device, dtype=dtype)
    nn.init.zeros_(table.weight)
    table.register_forward_hook(replace(noise_of(embedding) or Noise(0.0), segments=PROBED))
    ids = torch.zeros(len(PROBED), PROBED_LENGTH, dtype=torch.int64, device=device)
    with torch.no_grad():
        made, again = table(ids).float(), table(ids).float()
        silent = table.eval()(ids)
    shares, padding = [], made.clone()
    for row, _, tokens, length in _conversations(PROBED):
        part = made[row, tokens] / _bound(alpha, length, width)
        shares.append((float(part.abs().max()), float(part.square().mean().sqrt())))
        padding[row, tokens] = 0
    # A uniform variable's root mean square is 1 / sqrt(3) of its bound.
    is_off = any(top > 1.01 or abs(rms * math.sqrt(3) - 1) > 0.1 for top, rms in shares)
    wrong = {
        "it differs when it is drawn again": not torch.equal(made, again),
        "padding has noise": bool(padding.any()),
        "evaluation has noise": bool(silent.any()),
        f"largest value and root mean square to the bound: {shares}": is_off,
    }
    if found := "\n".join(what for what, is_so in wrong.items() if is_so):
        fix = f"{OFF}, or report this with the versions installed"
        raise TrainingError("The noise of NEFTune is wrong", found, fix)
    length, (top, rms) = PROBED[0][0], shares[0]
    bound = _bound(alpha, length, width)
    return (
        f"tested on {device.type}: on {length} tokens at most {top * bound:.4g}, where "
        f"{alpha:g} / sqrt({length} x {width}) is {bound:.4g}; root mean square {rms:.3f} of "
        "that (0.577 expected); on padding and in evaluation exactly none"
    )
