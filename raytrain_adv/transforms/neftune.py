"""NEFTune (https://arxiv.org/abs/2310.05914): noise on embeddings, against overfitting.

As in the paper, it is scaled by the length of the example. transformers scales it by that of the
padded or packed row, so that packed rows have too little, and padding has some too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from raytrain_adv.errors import JobError
from raytrain_adv.transforms.modules import class_name, fqn_of, input_embedding
from raytrain_adv.transforms.transform import Change, Context, Plan, Transform, Worker

if TYPE_CHECKING:
    from torch import nn

    from raytrain_adv.ops.noise import Segments

OFF = "delete neftune_noise_alpha"


class Neftune(Transform):
    """Add noise to the embeddings in training, scaled by each conversation's length; none on
    padding and in evaluation.
    """

    name: ClassVar[str] = "neftune"
    feature: ClassVar[str] = "NEFTune"
    stage: ClassVar[str] = "kernel"
    # The hook is on whatever module looks the embeddings up.
    stacks_on: ClassVar[frozenset[str]] = frozenset({"adapter", "precision"})
    proven_by: ClassVar[str] = "raytrain_adv::neftune_noise"
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
        from raytrain_adv.ops.noise import Noise

        for fqn in plan.changes:
            noise = Noise(self.neftune_noise_alpha or 0.0)
            model.get_submodule(fqn).register_forward_hook(noise)

    def what_is(self, module: nn.Module) -> str:
        """Return a module's class, and whether it adds noise."""
        from raytrain_adv.ops.noise import noise_of

        return f"{class_name(module)}{' with noise' if noise_of(module) is not None else ''}"

    def initialize(self, model: nn.Module, plan: Plan, seed: int) -> tuple[str, ...]:
        """Seed the noise."""
        from raytrain_adv.ops.noise import noises

        for noise in noises(model):
            noise.seed = seed
        return ()

    def begin_batch(self, model: nn.Module, step: int, first: int, segments: Segments) -> None:
        """Pass the batch's place and conversations to the hook, which draws the noise by them."""
        from raytrain_adv.ops.noise import noises

        for noise in noises(model):
            noise.step, noise.first, noise.segments = step, first, segments

    def install(self, model: nn.Module, plan: Plan, worker: Worker) -> Plan:
        """Measure the noise on the device that trains, on a table of zeros."""
        from raytrain_adv.ops.noise import measure

        how = (self.neftune_noise_alpha or 0.0, worker.device, worker.dtype)
        return plan.with_notes(*(measure(model.get_submodule(f), *how) for f in plan.changes))
