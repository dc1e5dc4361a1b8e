"""How modules are named in plans, messages and reports."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from raytrain_adv.errors import JobError

if TYPE_CHECKING:
    from torch import nn


def class_name(module: nn.Module) -> str:
    """Return a module's class with its package, as `torch.nn.Linear` or
    `peft.tuners.lora.layer.Linear`.

    The class that fully_shard puts in a module's place reads as the class it stands for.
    """
    kind = type(module)
    if (
        kind.__name__.startswith("FSDP")
        and len(kind.__mro__) > 2
        and not kind.__module__.startswith("torch.nn")
    ):
        kind = next((k for k in kind.__mro__ if not k.__name__.startswith("FSDP")), kind)
    package = kind.__module__
    if package.startswith("torch.nn.modules."):
        package = "torch.nn"
    return f"{package}.{kind.__qualname__}"


ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
"""Names that mixture-of-experts models give to the linears that choose experts."""


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the module that makes logits, if the model, or the one inside PEFT's, says which it
    is.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    untyped: Any = model
    head: nn.Module | None = untyped.get_output_embeddings()
    return head


def input_embedding(model: nn.Module) -> nn.Embedding | None:
    """Return the table in which the model, or the one inside PEFT's, looks up its input ids."""
    from torch import nn
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    untyped: Any = model
    found = untyped.get_input_embeddings()
    return found if isinstance(found, nn.Embedding) else None


def patterns(given: str | list[str]) -> list[str]:
    """Return the names and patterns of a key that takes them comma separated or as a list."""
    several = given.split(",") if isinstance(given, str) else given
    return [pattern.strip() for pattern in several if pattern.strip()]


def own_name(fqn: str) -> str:
    """Return a linear's name in the plain model: PEFT keeps it inside the adapter's module."""
    return fqn.removesuffix(".base_layer")


def matches(pattern: str, fqn: str) -> bool:
    """Whether a name, an end of a name, or a pattern with * stands for a module."""
    return fqn == pattern or fqn.endswith(f".{pattern}") or fnmatch.fnmatchcase(fqn, pattern)


def refuse_unmatched(key: str, given: Iterable[str], linears: list[str]) -> None:
    """Refuse patterns that stand for none of a model's linears.

    Raises:
        JobError: naming the pattern, the linears there are, and the nearest ones.
    """
    for pattern in given:
        if any(matches(pattern, fqn) for fqn in linears):
            continue
        known = sorted({short(fqn) for fqn in linears})
        close = nearest(pattern, known) or known
        raise JobError(
            f"{key} {pattern} matches no linear of the model",
            f"its linears are {', '.join(known)}",
            f"did you mean {', '.join(close[:3])}? a pattern may hold *",
        )


def short(name: str) -> str:
    """Return the last segment of a dotted name."""
    return name.rpartition(".")[2]


def nearest(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """Return the known names most like a name that does not exist, the best first."""
    return get_close_matches(name, list(dict.fromkeys(known)), n=most, cutoff=0.4)


def is_tied(model: nn.Module) -> bool:
    """Whether the embedding and the head are one parameter."""
    head, embedding = output_head(model), input_embedding(model)
    return head is not None and embedding is not None and head.weight is embedding.weight
