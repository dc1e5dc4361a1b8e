"""What the keys of adapters name: modules, which of them PEFT adapts, and folders of adapters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrain_adv.errors import JobError
from raytrain_adv.text import parse_json, split_names
from raytrain_adv.transforms.modules import (
    READ,
    UNKNOWN_EXPERTS,
    UNREACHED,
    class_name,
    did_you_mean,
    fqn_of,
    is_read,
    is_tied,
    lost_parts,
    output_head,
    short,
)

if TYPE_CHECKING:
    from torch import nn

CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
BASE, OWN = "base", "own_base"
"""Keys in the metadata of an adapter's file: the fingerprints of what it was trained on, and of the
OWN_BASE that was written with it.
"""
SAMPLES = 256  # of a file's bytes, in its fingerprint
SAMPLE_BYTES = 1024
OWN_BASE = "model-base"
"""Folder of a model that belongs to the adapter beside it, and is not the job's."""
STACKED_AS = {"gate_proj": "gate_up_proj", "w1": "gate_up_proj", "w2": "down_proj"}
STACKED_AS |= {"up_proj": "gate_up_proj", "w3": "gate_up_proj"}
"""Names of an expert's linears -> the stacked matrix they are in, if a model has no such linear."""


def check_targets(
    key: str,
    targets: list[str],
    model: nn.Module,
    linears: Iterable[str],
    experts: Mapping[str, nn.Module],
    against_experts: str,
) -> None:
    """Refuse names that mean nothing, or what cannot be adapted.

    `key` holds the names; `against_experts` is why stacked experts get no adapter, if so. Raises
    JobError, naming the module.
    """
    from raytrain_adv.ops.experts.find import matrices

    if not targets:
        raise JobError(f"{key} is empty", "no module names", f"set {key}: all, or name modules")
    named = [target for target in targets if target != "all"]
    in_experts = [f"{fqn}.{name}" for fqn, m in experts.items() for name in matrices(m)]
    for target in named:
        if named_here := [fqn for fqn in linears if names(target, fqn)]:
            if all(reasons := [reason_against(fqn, model) for fqn in named_here]):
                what = f"{key} names {target}, which cannot be adapted"
                found = f"{named_here[0]}: {reasons[0]}"
                raise JobError(what, found, f"take {target} out of {key}")
            continue
        stacked_in = [f for f in in_experts if names(STACKED_AS.get(target, target), f)]
        if not stacked_in and not any(names(target, fqn) for fqn in experts):
            known = sorted({short(fqn) for fqn in [*linears, *in_experts]})
            raise _no_target(key, target, model, known)
        if against_experts:
            raise JobError(
                f"{key} names {target}, which cannot be adapted",
                f"it is in stacked experts: {against_experts}",
                f"take {target} out of {key}, or delete what PEFT cannot do",
            )
    name = fqn_of(model, output_head(model)) or "lm_head"
    if is_tied(model) and any(names(target, name) for target in named):
        raise JobError(
            f"{key} names {name}, whose weight is also the input embedding",
            "tie_word_embeddings is true in the model's config.json",
            f"take {name} out of {key}",
        )


def reason_against(fqn: str, model: nn.Module, use_dora: bool = False) -> str:
    """Return why PEFT refuses an adapter on a linear, or why it would not be used, if so."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    from raytrain_adv.ops.experts.adapted import taken_for_experts

    name = short(fqn)
    config: Any = LoraConfig()
    untyped: Any = model
    if is_read(model, fqn):
        return f"{READ}: an adapter would not be used"
    if has_own_forward(model.get_submodule(fqn)):
        return f"a {class_name(model.get_submodule(fqn))}, not a plain linear"
    if not model.get_submodule(fqn).get_parameter("weight").requires_grad:
        return UNREACHED
    try:
        _check_lora_target_modules_mamba(config, untyped, name)
    except ValueError:
        return f"PEFT refuses {name} in models of type {untyped.config.model_type}"
    if use_dora and taken_for_experts(fqn, model):
        return "PEFT takes it for stacked experts, which it adapts without use_dora only"
    return lost_parts(model, [fqn], "lora_A.weight").get(fqn, "")


def reason_against_experts(module: nn.Module) -> str:
    """Return why an adapter on stacked experts cannot be computed, or would get no gradient."""
    from raytrain_adv.ops.experts.find import layout_of, matrices

    if not all(matrix.requires_grad for matrix in matrices(module).values()):
        return UNREACHED
    return "" if layout_of(module) else UNKNOWN_EXPERTS


def has_own_forward(linear: nn.Module) -> bool:
    """Whether a model's own class of linears computes another product than PyTorch's, as grouped
    ones do: PEFT takes them for plain ones.
    """
    from torch import nn

    kind = type(linear)
    of_model = kind.__module__.startswith(("transformers.models.", "transformers_modules."))
    return of_model and kind.forward is not nn.Linear.forward


def _no_target(key: str, target: str, model: nn.Module, known: list[str]) -> JobError:
    named = [m for fqn, m in model.named_modules() if names(target, fqn)]
    if named:
        what, found = f"{key} {target} is not a linear module", class_name(named[0])
        return JobError(what, f"it is a {found}", f"choose among {', '.join(known)}")
    return JobError(
        f"{key} {target} matches no module of {short(class_name(model))}",
        f"its linear modules are {', '.join(known)}",
        f"did you mean {did_you_mean(target, known)}?",
    )


def names(target: str, fqn: str) -> bool:
    """Whether an entry of the targets names this module: its whole fqn, or the end of it."""
    return fqn == target or fqn.endswith(f".{target}")


def own_base(folder: Path) -> Path | None:
    """Return the model that an adapter's run wrote for it, also if both were moved since; none if
    the adapter belongs to a model from elsewhere. Raises JobError if it is not an adapter.
    """
    if (folder / "config.json").is_file():
        return folder
    named = Path(str(_read_config(str(folder)).get("base_model_name_or_path")))
    beside = folder.absolute().with_name(named.name)
    if named.name != OWN_BASE:
        return None
    return beside if beside.is_dir() else named


def check_bases(folders: list[str], merged: Iterable[str], model: str) -> None:
    """Refuse folders that are not adapters, or adapters of another base than the job's model:
    without what was merged into that, or PiSSA took out of it, the sum is a model that nobody
    trained; also if its weights changed. Adapters after the first may belong to the sum with it.
    Raises JobError, naming the folder.
    """
    for folder in folders[:1]:
        base = own_base(Path(folder).expanduser())
        if base is not None and base.resolve() != Path(model).expanduser().resolve():
            what = f"The adapter {folder} belongs to another model than the job's"
            found = f"model_name_or_path is {model}; the adapter was trained on {base}"
            raise JobError(what, found, f"set model_name_or_path: {base}")
    for folder in merged:
        started = _read_config(folder).get("init_lora_weights")
        if isinstance(started, str) and started.startswith("pissa"):
            fix = "export it with pissa_convert: true"
            raise JobError(f"The adapter {folder} belongs to another base", started, fix)
    if Path(model).expanduser().is_dir():  # one of the Hub is compared once it is fetched
        check_trained_on(folders, Path(model).expanduser())


def check_trained_on(folders: Iterable[str], model: Path) -> None:
    """Refuse adapters that were trained on other weights than the model's folder has, and than its
    sum with those before them. Raises JobError, naming the adapter.
    """
    parts, known = [model], set[str]()
    for folder in folders:
        own = Path(folder).expanduser()
        known.add(fingerprint(parts))
        if (held := held_bases(own)) and not held & known:
            raise JobError(
                f"The adapter {folder} was trained on other weights than {model} has now",
                f"{own / ADAPTER_FILE} has the fingerprint of its model, and the model another",
                "set model_name_or_path to the model that it was trained on, or put those weights "
                "back: look into previous/ of the run that replaced them",
            )
        parts.append(own)


def held_bases(folder: Path) -> set[str]:
    """Return the fingerprints in an adapter's file of the models that it belongs to; none if it was
    written elsewhere, before there were fingerprints, or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
            held = file.metadata() or {}
    except (OSError, SafetensorError):
        return set()
    return {held[key] for key in (BASE, OWN) if key in held}


def fingerprint(folders: Iterable[Path]) -> str:
    """Return a digest of the sizes and samples of the weights in folders: another one for models
    that were trained further, and soon computed of large ones.
    """
    digest = hashlib.sha256()
    for path in (path for folder in folders for path in sorted(folder.glob("*.safetensors"))):
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as file:
            for start in range(0, size, max(size // SAMPLES, SAMPLE_BYTES)):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def check_continued(
    folder: str, kind: str, ours: Mapping[str, tuple[str, Any]], adapted: set[str], target_key: str
) -> None:
    """Refuse to continue an adapter that differs from the job's.

    `ours` has for entries of PEFT's file the key here and its value; `adapted` are the fqns of the
    planned linears. Raises JobError, naming what differs.
    """
    config = _read_config(folder)
    theirs = {name: config.get(name, False) for name in ours}
    wrong = {key: theirs[n] for n, (key, value) in ours.items() if theirs[n] != value}
    targets = split_names(config.get("target_modules"))
    weights = split_names(config.get("target_parameters"))  # linears that PEFT names so
    targets += [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    if {fqn for fqn in adapted if any(names(target, fqn) for target in targets)} != adapted:
        wrong[target_key] = ",".join(sorted(targets))
    if (its_kind := str(config.get("peft_type", "lora")).lower()) != kind:
        wrong = {"finetuning_type": its_kind}
    if wrong:
        fix = "set " + ", ".join(f"{key}: {value}" for key, value in wrong.items())
        differ = ", ".join(f"{key} is {value}" for key, value in wrong.items())
        found = f"{Path(folder) / CONFIG}: {differ}"
        raise JobError("The adapter to continue differs from the job's", found, fix)


def _read_config(folder: str) -> dict[str, Any]:
    try:
        found = dict(parse_json((Path(folder) / CONFIG).read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        fix = f"name a folder with {CONFIG} and {ADAPTER_FILE}; one of the Hub's is "
        fix += "fetched by: hf download OWNER/NAME --local-dir FOLDER"
        what = f"adapter_name_or_path: {folder} is not an adapter of PEFT's"
        raise JobError(what, str(error), fix) from error
    return found
