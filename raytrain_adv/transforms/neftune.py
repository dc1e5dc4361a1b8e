"""NEFTune (https://arxiv.org/abs/2310.05914): noise on embeddings, against overfitting.

As in the paper, it is scaled by the length of the example. transformers scales it by that of the
padded or packed row, so that packed rows have too little, and padding has some too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from raytrain_adv.errors import JobError, TrainingError
from raytrain_adv.transforms.modules import class_name, fqn_of, input_embedding
from raytrain_adv.transforms.transform import Change, Context, Plan, Segments, Transform, Worker

if TYPE_CHECKING:
    import torch
    from torch import nn

NOISE = "raytrain_adv::neftune_noise"
"""What a profile of a training step calls the noise."""
OFF = "delete neftune_noise_alpha"
PROBED = ((24,), (8, 12))
"""Tokens of the conversations in the two rows of the trial, 32 places each."""
PROBED_LENGTH, PROBED_ROWS = 32, 4


class Neftune(Transform):
    """Add noise to the embeddings in training, scaled by each conversation's length; none on
    padding and in evaluation.
    """

    name: ClassVar[str] = "neftune"
    feature: ClassVar[str] = "NEFTune"
    stage: ClassVar[str] = "kernel"
    # The hook is on whatever module looks the embeddings up.
    stacks_on: ClassVar[frozenset[str]] = frozenset({"adapter", "precision"})
    proven_by: ClassVar[str] = NOISE
    tried_with: ClassVar[dict[str, Any]] = {"neftune_noise_alpha": 5}

    neftune_noise_alpha: Annotated[float, Field(ge=0)] | None = None
    """Size of the noise on the embeddings: alpha / sqrt(tokens of the conversation x features); 5
    to 15 are usual, null and 0 add none."""

    def is_changed(self, key: str) -> bool:
        """Whether a key has another value than its default; 0 turns nothing on."""
        return super().is_changed(key) and self.neftune_noise_alpha != 0

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Find the table in which input ids are looked up."""
        embedding = input_embedding(model)
        fqn = fqn_of(model, embedding)
        if embedding is None or fqn is None:
            found = f"{class_name(model)} does not name the module that looks input ids up"
            raise JobError("neftune_noise_alpha needs an input embedding", found, OFF)
        kind = class_name(embedding)
        note = (
            f"uniform noise up to {self.neftune_noise_alpha:g} / sqrt(tokens of the conversation x "
            f"{embedding.embedding_dim}) on the embeddings; none on padding and in evaluation"
        )
        return Plan(self.name, {fqn: Change(kind, f"{kind} with noise")}, notes=(note,))

    def prepare(self, model: nn.Module, plan: Plan) -> None:
        """Put the hook on the planned embedding."""
        for fqn in plan.changes:
            noise = Noise(self.neftune_noise_alpha or 0.0)
            model.get_submodule(fqn).register_forward_hook(noise)

    def what_is(self, module: nn.Module) -> str:
        """Return a module's class, and whether it adds noise."""
        return f"{class_name(module)}{' with noise' if noise_of(module) is not None else ''}"

    def initialize(self, model: nn.Module, plan: Plan, seed: int) -> tuple[str, ...]:
        """Seed the noise."""
        for noise in _noises(model):
            noise.seed = seed
        return ()

    def begin_batch(self, model: nn.Module, step: int, first: int, segments: Segments) -> None:
        """Pass the batch's place and conversations to the hook, which draws the noise by them."""
        for noise in _noises(model):
            noise.step, noise.first, noise.segments = step, first, segments

    def install(self, model: nn.Module, plan: Plan, worker: Worker) -> Plan:
        """Measure the noise on the device that trains, on a table of zeros."""
        embeddings = map(model.get_submodule, plan.changes)
        return plan.with_notes(*(self._measure(one, worker) for one in embeddings))

    def _measure(self, embedding: nn.Module, worker: Worker) -> str:
        import torch
        from torch import nn

        alpha = self.neftune_noise_alpha or 0.0
        width = int(embedding.embedding_dim)  # type: ignore[arg-type] # planned as an embedding
        device = worker.device
        table = nn.Embedding(PROBED_ROWS, width, device=device, dtype=worker.dtype)
        nn.init.zeros_(table.weight)
        noise = replace(noise_of(embedding) or Noise(0.0), segments=PROBED)
        table.register_forward_hook(noise)
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

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor
    ) -> torch.Tensor:
        """Return the embeddings [sequences, time, features] with noise, in training."""
        import torch

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

    def made_for(self, output: torch.Tensor) -> torch.Tensor:
        """Return the noise for embeddings of this shape, device and dtype."""
        import torch

        from raytrain_adv.dtensor import seed_of

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


def _noises(model: nn.Module) -> Iterator[Noise]:
    yield from filter(None, map(noise_of, model.modules()))


def noise_of(module: nn.Module) -> Noise | None:
    """Return the hook of a module that adds noise."""
    hooks = module._forward_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, Noise)), None)
