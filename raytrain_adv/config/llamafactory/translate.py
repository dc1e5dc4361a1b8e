"""Translate LLaMA-Factory's keys and values into this package's, or refuse them with a reason.

The tables apply only to keys that no section or transform owns.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from raytrain_adv.config.llamafactory import keys as tables
from raytrain_adv.config.llamafactory.keys import (
    FILES,
    LISTED,
    MAPPED,
    REFUSED,
    RENAMED,
    SAME,
    VALUE_NAMES,
)
from raytrain_adv.config.llamafactory.sharding import SHARDING, map_sharding
from raytrain_adv.config.problems import Problem, show
from raytrain_adv.config.templates import TEMPLATES

UNSET_WHEN_NULL = {
    "packing", "report_to", "lr_scheduler_kwargs", "lora_alpha", "optim_args", "max_samples"
}  # fmt: skip
"""Keys that LLaMA-Factory's own files set to null to leave them out."""


@dataclass
class Translation:
    """A job's keys and values, translated."""

    keys: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    """This package's key -> the key in the file, if the two differ."""
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """For the user: keys that were accepted and have no effect, and why."""
    unknown: list[str] = field(default_factory=list)


def known_keys() -> Iterable[str]:
    """Return every key of LLaMA-Factory that keys.yaml lists."""
    return (*SAME, *LISTED, *REFUSED, *RENAMED, *MAPPED, *SHARDING)


def other_file(keys: Mapping[str, Any]) -> Problem | None:
    """Return what a file is that is not a training job; none if it is one, or neither."""
    for key, (what, fix) in FILES.items():
        if keys.get(key) and not keys.get("do_train"):
            return Problem(f"it is {what}", fix, key)
    return None


def translate(keys: Mapping[str, Any], owned: frozenset[str]) -> Translation:
    """Translate a job's keys and values; `owned` are all keys of sections and transforms."""
    result = Translation()
    keys = _expand(result, keys)
    for key, value in keys.items():
        ours = RENAMED.get(key, key)
        if ours in owned:
            _add_owned(result, key, ours, value, keys)
        elif value is not None and ours in LISTED:
            if not value:
                continue
            result.notes.append(f"{key}: {show(value, key)} changes nothing: {LISTED[ours]}")
        elif ours in SAME:
            _refuse_unless(result, key, value, SAME[ours])
        elif ours in REFUSED:
            _refuse_unless(result, key, value, REFUSED[ours])
        elif ours not in LISTED:
            result.unknown.append(key)
    if keys.get("do_eval") is True and not (keys.get("val_size") or keys.get("eval_dataset")):
        fix = "hold rows out with val_size, or name an eval_dataset"
        result.problems.append(Problem("true: there are no rows to evaluate", fix, "do_eval"))
    return result


def _expand(result: Translation, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Replace keys that stand for others; a value that the file gives those itself wins."""
    kept = dict(keys)
    for key, value in keys.items():
        ours: dict[str, Any] | Problem | None = None
        why = "FSDP2 shards the model"
        if key in MAPPED and _same(value, MAPPED[key][0]):
            _, ours, why = MAPPED[key]
        elif key in SHARDING:
            ours = map_sharding(key, value) if value else None
        else:
            continue
        del kept[key]
        if isinstance(ours, Problem):
            result.problems.append(replace(ours, key=key))
        elif ours is not None:
            own = {name: one for name, one in ours.items() if name == key or not keys.get(name)}
            kept.update(own)
            result.names.update(dict.fromkeys(own, key))
            given = [f"{n}: {show(keys[n])}, as given" for n in ours if n not in own]
            shown = ", ".join(
                [f"{n}: {show(v)}" for n, v in own.items()] or given or ["nothing more"]
            )
            result.notes.append(f"{key}: {show(value, key)} runs as {shown}: {why}")
    return kept


def _refuse_unless(result: Translation, key: str, value: Any, known: tables.Key) -> None:
    if value is not None and not any(_same(value, one) for one in known.accepted):
        result.problems.append(Problem(f"{show(value, key)}: {known.why}", known.fix, key))


def _add_owned(
    result: Translation, key: str, ours: str, value: Any, keys: Mapping[str, Any]
) -> None:
    twice = ""
    if ours != key and ours in keys:
        twice = f"an older name of {ours}, which is given too"
    elif ours == "warmup_steps" and isinstance(value, float) and 0.0 < value < 1.0:
        ours = "warmup_ratio"  # transformers 5 takes a share of all steps as warmup_steps too
        if keys.get(ours) is not None:
            twice = f"{show(value)} is a share of the steps, and so is {ours}"
    if twice:
        result.problems.append(Problem(twice, "keep one of the two", key))
        return
    if ours != key:
        result.names[ours] = key
    if value is None and ours in UNSET_WHEN_NULL:
        return
    translated = _value(ours, value)
    if isinstance(translated, Problem):
        result.problems.append(replace(translated, key=key))
    else:
        if isinstance(translated, str) and isinstance(value, str) and translated != value:
            result.notes.append(f"{key}: {value} runs as {translated}")
        result.keys[ours] = translated


def _value(key: str, value: Any) -> Any:
    """Return the value as this package has it, or a Problem without its key."""
    if isinstance(value, str):
        if (key, value) in tables.REFUSED_VALUES:
            why, fix = tables.REFUSED_VALUES[key, value]
            return Problem(": ".join(part for part in (show(value), why) if part), fix)
        value = VALUE_NAMES.get(key, {}).get(value, value)
    return VALUES[key](value) if key in VALUES else value


def _same(value: Any, other: Any) -> bool:
    """Compare as YAML does: 1 differs from true and equals 1.0."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _strategy(value: Any) -> Any:
    # YAML 1.1 reads an unquoted no or off as false.
    return "no" if value is False else value


def _template(value: Any) -> Any:
    if not isinstance(value, str) or value in TEMPLATES:
        return value
    near = get_close_matches(value, TEMPLATES, 3, 0.5)
    fix = f"give the name of the model's family{': ' if near else ''}{', '.join(near)}"
    fix += "; or delete it, if the tokenizer has a chat template of its own"
    return Problem(f"{show(value)}: there is no such template", fix)


def _dataset_dir(value: Any) -> Any:
    if isinstance(value, dict):
        fix = "write it to dataset_info.json in a folder"
        return Problem("a mapping: dataset_info is read from a file", fix)
    return value


def _boolean(value: Any) -> Any:
    words = {"true": True, "false": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


VALUES: dict[str, Callable[[Any], Any]] = {
    "save_strategy": _strategy,
    "eval_strategy": _strategy,
    "template": _template,
    "dataset_dir": _dataset_dir,
    "resume_from_checkpoint": _boolean,
    "gradient_checkpointing": _boolean,
}
"""Keys whose values LLaMA-Factory or YAML also writes in another way."""
