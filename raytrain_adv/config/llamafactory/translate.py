"""LLaMA-Factory's other keys: what each means here, or why it cannot be honored and what to do.

A key that a section or a transform owns is never looked up in its tables, so a transform that is
added takes its keys over.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from raytrain_adv.config.llamafactory import keys as llamafactory_keys
from raytrain_adv.config.llamafactory.keys import LISTED, SAME
from raytrain_adv.config.llamafactory.other_formats import ELSEWHERE
from raytrain_adv.config.problems import Problem, show
from raytrain_adv.config.sections import Template

REFUSED = {**llamafactory_keys.REFUSED, **ELSEWHERE}
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "enable_liger_kernel": "use_liger_kernel",
    "no_cuda": "use_cpu",
}
"""Keys that are written under another name here; true only when that name has an owner."""

OPTIMIZERS = {"adamw_8bit": "adamw_torch_8bit", "adamw_bnb_8bit": "adamw_torch_8bit"}
TEMPLATES: tuple[str, ...] = get_args(Template)
UNSET_WHEN_NULL = {
    "packing",
    "report_to",
    "lr_scheduler_kwargs",
    "lora_alpha",
    "optim_args",
    "max_samples",
}
"""Keys that LLaMA-Factory's own files set to null to leave them out."""

_VALUE_REFUSED: dict[str, dict[str, tuple[str, str]]] = {
    "stage": dict.fromkeys(
        ("pt", "rm", "ppo", "dpo", "kto"),
        (
            "this training stage is not in this version",
            "only supervised fine-tuning, stage: sft, is",
        ),
    ),
    "finetuning_type": dict.fromkeys(
        ("freeze", "oft"),
        ("this method is not in this version", "choose finetuning_type: lora or full"),
    ),
    "optim": dict.fromkeys(
        ("paged_adamw_8bit", "paged_adamw_32bit", "paged_adamw"),
        (
            "paged optimizer states are not in this version",
            "choose optim: adamw_torch_8bit, or set fsdp_cpu_offload: true",
        ),
    ),
    "dataset_dir": {"ONLINE": ("", "delete it and name the Hub datasets in dataset")},
}


@dataclass
class Translation:
    """A job's keys in this package's words."""

    keys: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    """This package's key -> the key it was written as, where the two differ."""
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Keys that were accepted although nothing changes with them, and why; shown to the user."""
    unknown: list[str] = field(default_factory=list)


def known_keys() -> Iterable[str]:
    """Return every key of LLaMA-Factory that has an entry here."""
    return (*SAME, *LISTED, *REFUSED, *RENAMED)


def translate(keys: Mapping[str, Any], owned: frozenset[str]) -> Translation:
    """Return the keys with LLaMA-Factory's names and values put into this package's.

    Args:
        keys: the job file's keys and values.
        owned: every key that a section or a transform has.
    """
    result = Translation()
    for key, value in keys.items():
        ours = RENAMED.get(key, key)
        if ours in owned:
            _add_owned(result, key, ours, value, keys)
        elif value is not None and ours in LISTED:
            result.notes.append(f"{key}: {show(value, key)} changes nothing: {LISTED[ours]}")
        elif ours in SAME:
            _refuse_unless(result, key, value, *SAME[ours])
        elif ours in REFUSED:
            default, why, fix = REFUSED[ours]
            _refuse_unless(result, key, value, (default,), why, fix)
        elif ours not in LISTED:
            result.unknown.append(key)
    if keys.get("do_eval") is True and not (keys.get("val_size") or keys.get("eval_dataset")):
        fix = "hold rows out with val_size, or name an eval_dataset"
        result.problems.append(Problem("true: there are no rows to evaluate", fix, "do_eval"))
    return result


def _refuse_unless(
    result: Translation, key: str, value: Any, accepted: tuple[Any, ...], why: str, fix: str
) -> None:
    if value is not None and not any(_same(value, one) for one in accepted):
        result.problems.append(Problem(f"{show(value, key)}: {why}", fix, key))


def _add_owned(
    result: Translation, key: str, ours: str, value: Any, keys: Mapping[str, Any]
) -> None:
    if ours != key and ours in keys:
        result.problems.append(
            Problem(
                f"it is the older name of {ours}, which is given too", "keep one of the two", key
            )
        )
        return
    if ours != key:
        result.names[ours] = key
    if value is None and ours in UNSET_WHEN_NULL:
        return
    refused = _VALUE_REFUSED.get(ours, {}).get(value) if isinstance(value, str) else None
    if refused is not None:
        result.problems.append(
            Problem(": ".join(part for part in (show(value), refused[0]) if part), refused[1], key)
        )
        return
    translated = VALUES[ours](value) if ours in VALUES else value
    if isinstance(translated, Problem):
        result.problems.append(Problem(translated.text, translated.fix, key))
    elif isinstance(translated, _Rename) and keys.get(translated.key) is not None:
        text = f"{show(value)} is a share of the steps, and so is {translated.key}"
        result.problems.append(Problem(text, "keep one of the two", key))
    elif isinstance(translated, _Rename):
        result.keys[translated.key] = value
        result.names[translated.key] = key
    else:
        if isinstance(translated, str) and isinstance(value, str) and translated != value:
            result.notes.append(f"{key}: {value} runs as {translated}")
        result.keys[ours] = translated


def _same(value: Any, other: Any) -> bool:
    """Compare as YAML would: 1 and true are two things, 1 and 1.0 are one."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


@dataclass(frozen=True)
class _Rename:
    key: str


def _strategy(value: Any) -> Any:
    # YAML 1.1 reads an unquoted no or off as false.
    return "no" if value is False else value


def _warmup_steps(value: Any) -> Any:
    # transformers 5 takes a share of all steps under this name too.
    if isinstance(value, float) and 0.0 < value < 1.0:
        return _Rename("warmup_ratio")
    return value


def _optim(value: Any) -> Any:
    return OPTIMIZERS.get(value, value) if isinstance(value, str) else value


def _quantization_method(value: Any) -> Any:
    return "bnb" if value == "bitsandbytes" else value


def _template(value: Any) -> Any:
    if not isinstance(value, str) or value in TEMPLATES:
        return value
    fix = f"delete it: the tokenizer's own chat template is used; or give {', '.join(TEMPLATES)}"
    return Problem(f"{show(value)}: this template is not in this version", fix)


def _flash_attn(value: Any) -> Any:
    names = {"flash_attention_2": "fa2", "flash_attention_3": "fa3", "eager": "disabled"}
    return names.get(value, value) if isinstance(value, str) else value


def _dataset_dir(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("REMOTE:"):
        fix = "delete it and name the Hub datasets in dataset, or give a folder"
        return Problem(f"{show(value)}: a dataset_info.json on the Hub is not read", fix)
    if isinstance(value, dict):
        return Problem(
            "a mapping: dataset_info is read from a file",
            "write it to dataset_info.json in a folder",
        )
    return value


def _resume(value: Any) -> Any:
    return (
        {"true": True, "false": False}.get(value.lower(), value)
        if isinstance(value, str)
        else value
    )


def _gradient_checkpointing(value: Any) -> Any:
    return _resume(value)


VALUES: dict[str, Callable[[Any], Any]] = {
    "save_strategy": _strategy,
    "eval_strategy": _strategy,
    "warmup_steps": _warmup_steps,
    "optim": _optim,
    "quantization_method": _quantization_method,
    "template": _template,
    "flash_attn": _flash_attn,
    "dataset_dir": _dataset_dir,
    "resume_from_checkpoint": _resume,
    "gradient_checkpointing": _gradient_checkpointing,
}
"""Keys whose values LLaMA-Factory, or YAML, also writes in another way."""
