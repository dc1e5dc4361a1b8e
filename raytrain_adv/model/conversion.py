"""Checkpoints whose tensors transformers renames or fuses on load, converted group by group.

transformers keeps a mapping for each such architecture (Mixtral's stacked experts) and converts
whole models; this applies the mapping as tensors are needed, so that a process holds one group.
Source: convert_and_load_state_dict_in_model and revert_weight_conversion in transformers'
core_model_loading, 5.17 to 5.23.
"""

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

Read = Callable[[str], torch.Tensor]


@dataclass
class Group:
    """Tensors that are converted together: from a checkpoint to the model, or back."""

    first_target: str
    converter: WeightConverter | None = None
    """None if the tensor is only renamed."""
    sources: list[tuple[str, str]] = field(default_factory=list)
    """Name of the source and the mapping's pattern it matched, in the order they are needed."""
    targets: tuple[str, ...] = ()
    renamings: tuple[WeightRenaming, ...] = ()
    """Applied to the names that come out."""

    def convert(self, read: Read, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Read the sources and return the targets by name; nothing is kept."""
        if self.converter is None:
            return {self.first_target: read(self.sources[0][0])}
        converter = deepcopy(self.converter)
        for name, pattern in self.sources:
            # A callable is read when the conversion needs it; transformers types only its futures.
            converter.add_tensor(self.first_target, name, pattern, cast(Any, partial(read, name)))
        realized = converter.convert(self.first_target, model=model, config=model.config)
        return {_renamed(name, self.renamings): _single(value) for name, value in realized.items()}


@dataclass
class Route:
    """How a checkpoint's tensors become the model's."""

    direct: dict[str, str] = field(default_factory=dict)
    """Name in the model -> name in the checkpoint, for tensors that are at most renamed."""
    groups: list[Group] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    """Names in the checkpoint for which the model has no tensor."""


def route(model: PreTrainedModel, held: Iterable[str]) -> Route:
    """Match a checkpoint's tensor names with those of an unchanged model (meta will do)."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    wanted = model.state_dict()
    prefix = model.base_model_prefix
    result = Route()
    groups: dict[str, Group] = {}
    for name in sorted(held, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = rename_source_key(name, [], [], prefix, wanted)
        if target not in wanted:
            result.unexpected.append(name)
        elif pattern is None:
            result.direct[target] = name
        else:
            group = groups.setdefault(target, Group(target, by_pattern[pattern]))
            group.sources.append((name, pattern))
    result.groups = list(groups.values())
    for group in result.groups:
        patterns = cast(WeightConverter, group.converter).target_patterns
        names = [group.first_target.replace(patterns[0], pattern) for pattern in patterns]
        group.targets = tuple(n for n in wanted if any(fnmatchcase(n, name) for name in names))
    return result


def save_groups(model: PreTrainedModel, names: Iterable[str]) -> Iterator[Group]:
    """Yield the model's tensors in groups that convert to the checkpoint's layout, in fixed order.

    Prefix changes are not undone: transformers loads both forms.
    """
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    undone = [
        entry.reverse_transform() for entry in mapping[::-1] if not isinstance(entry, PrefixChange)
    ]
    renamings = tuple(entry for entry in undone if isinstance(entry, WeightRenaming))
    converters = [entry for entry in undone if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    groups: dict[str, Group] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = _first_match(name, converters)
        if pattern is None:
            target = _renamed(name, renamings)
            groups[target] = Group(target, sources=[(name, name)])
        else:
            new = Group(target, by_pattern[pattern], renamings=renamings)
            groups.setdefault(target, new).sources.append((name, pattern))
    yield from groups.values()


def _first_match(name: str, converters: Iterable[WeightConverter]) -> tuple[str, str | None]:
    for converter in converters:
        target, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return target, pattern
    return name, None


def _renamed(name: str, renamings: Iterable[WeightRenaming]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def _single(value: Any) -> torch.Tensor:
    tensor: torch.Tensor = value[0] if isinstance(value, list) else value
    return tensor
