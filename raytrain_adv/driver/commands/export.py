"""`raytrain-adv export`: model folders from a run's checkpoint, or a quantized one from any model
folder; one process, in host memory, without Ray.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from raytrain_adv import hardware
from raytrain_adv.checkpoint import save
from raytrain_adv.checkpoint.folders import Found, all_folders, find, wrong_bytes
from raytrain_adv.config.job import JobConfig, transform_types
from raytrain_adv.config.load import load_keys
from raytrain_adv.config.problems import Problem, job_error
from raytrain_adv.config.yaml_source import read_value
from raytrain_adv.data.tokens.tokenizer import load_tokenizer
from raytrain_adv.driver.output.output_dir import RUN_FILE, storage_path
from raytrain_adv.errors import JobError, StorageError, TrainingError
from raytrain_adv.export.convert import write_converted
from raytrain_adv.export.folder import NewFolder, folder_gib
from raytrain_adv.export.merge import export_merged
from raytrain_adv.export.model_folder import export_model
from raytrain_adv.export.verify import DEFECT, MOST_TOKENS, compare_converted, converted_logits
from raytrain_adv.model import weights
from raytrain_adv.model.build import build, read_config
from raytrain_adv.model.files import nearest_folders
from raytrain_adv.ops.fake_quant.torchao_config import FLOAT8
from raytrain_adv.storage.storage import Storage
from raytrain_adv.text import GIB, disk
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.lora import Lora
from raytrain_adv.transforms.qat import Qat
from raytrain_adv.transforms.quantized_base import QuantizedBase
from raytrain_adv.transforms.transform import Plan

CPU = torch.device("cpu")
MEANINGLESS = frozenset({"compare", "fake_quant_after_n_steps"})
"""QAT keys that only affect training."""
NO_GPU = "float8 products need a GPU, and this command has none"
KEPT = (Lora, Qat, QuantizedBase)
"""Transforms whose keys matter when there is nothing to train."""


def run(
    source: str, checkpoint_name: str, output: str, overrides: Sequence[str], merge: bool = False
) -> None:
    """Write model folders, and print where they are and their sizes on disk.

    Args:
        source: a run's output_dir, or a model folder.
        checkpoint_name: step_N or a path, for a run; empty takes the newest.
        output: the folder to write; empty stands for one in the run's.
        overrides: QAT keys as key=value.
        merge: write one model, with the adapter of a LoRA run merged into its base.

    Raises:
        JobError: when there is no such run, checkpoint or model, or a key is none of QAT's.
        StorageError: when the folder cannot be written.
        TrainingError: when the quantized model does not compute what the checkpoint does with fake
            quantization.
    """
    folder = Path(source).expanduser()
    given = _qat_keys(overrides)
    record = Storage.at(str(folder)).read_json(RUN_FILE) if folder.is_dir() else None
    try:
        if record is not None and merge:
            _merge_run(folder, record["job"], checkpoint_name, output, given)
        elif merge:
            raise _not_mergeable(f"{source} is not a run's output_dir")
        elif record is not None:
            _export_run(folder, record["job"], checkpoint_name, output, given)
        elif (folder / "config.json").is_file():
            _export_folder(folder, checkpoint_name, output, given)
        else:
            raise _neither(source, folder)
    except StorageError as error:
        way_out = "make room, or name another folder by --output"
        raise StorageError(error.what, error.found, way_out) from error


def _qat_keys(overrides: Sequence[str]) -> list[str]:
    """Refuse keys that do not affect how a model is quantized."""
    allowed = {*Qat.model_fields, "trust_remote_code"} - MEANINGLESS
    problems = [
        Problem(
            "is not a key of this command" if key not in MEANINGLESS else "says how to train",
            f"leave it out; there are {', '.join(sorted(allowed))}",
            key,
        )
        for key in (item.partition("=")[0] for item in overrides)
        if key not in allowed
    ]
    if problems:
        raise job_error("The command line", problems)
    return list(overrides)


def _neither(source: str, folder: Path) -> JobError:
    fix = f"name a folder that holds {RUN_FILE}, or one that holds config.json and safetensors"
    runs = [path for path in folder.absolute().parents if (path / RUN_FILE).is_file()]
    if runs:
        found = f"it lies in the run {runs[0]}"
        fix = f"raytrain-adv export {runs[0]}, with --checkpoint for another than its newest"
    elif not folder.is_dir():
        found = nearest_folders(folder)
    else:
        found = f"it holds {', '.join(sorted(p.name for p in folder.iterdir())[:8]) or 'nothing'}"
    return JobError(f"{source} is neither a run's output_dir nor a model folder", found, fix)


def _export_folder(source: Path, checkpoint_name: str, output: str, given: list[str]) -> None:
    """Quantize a model folder as it is (PTQ)."""
    if checkpoint_name:
        fix = "leave --checkpoint out, or name the output_dir of a run"
        raise JobError("a model folder has no checkpoints", f"--checkpoint {checkpoint_name}", fix)
    if not output:
        raise JobError("--output is missing", str(source), "name the new folder: --output DIR")
    keys: dict[str, Any] = {
        "model_name_or_path": str(source),
        "finetuning_type": "full",
        "dataset": "none",
        "output_dir": output,
    }
    stored = read_config(load_keys(keys, str(source), _code(given))).dtype
    dtype = stored if isinstance(stored, torch.dtype) else torch.float32
    if dtype != torch.bfloat16 and _values(given).get("qat_activation_dtype") == FLOAT8:
        raise JobError(
            "float8 activations need a model in bfloat16: products of float8 rows come out in it",
            f"{source} is in {str(dtype).removeprefix('torch.')}",
            "leave qat_activation_dtype out, or give a bfloat16 copy of the model",
        )
    keys["pure_bf16"] = dtype == torch.bfloat16
    job = load_keys(keys, str(source), given)
    if not job.transform(Qat).enabled:
        raise _nothing_to_quantize(f"{source} is a model folder already")
    target = _new(Path(output))
    new = NewFolder(target, CPU)
    new.run(lambda: write_converted(source, new.partial, job, dtype, CPU, require=new.require_now))
    compared: list[str] = []
    new.run(lambda: compared.append(_compared(job, new.partial, dtype)))
    new.publish()
    before = sum(f.stat().st_size for f in source.glob("*.safetensors")) / GIB
    print(
        f"quantized  {target} ({disk(folder_gib(target))}; the weights of {source}: {disk(before)})"
    )
    print(f"           {job.transform(Qat).scheme}; not trained for it (PTQ)")
    print(f"           {compared[0]}")


def _code(given: list[str]) -> list[str]:
    """Return the keys needed to read a model's config: whether its code may run."""
    return [item for item in given if item.startswith("trust_remote_code=")]


def _values(given: list[str]) -> dict[str, Any]:
    """Return what the keys are set to, read as YAML; the job refuses malformed ones."""
    values: dict[str, Any] = {}
    for item in given:
        key, _, text = item.partition("=")
        with contextlib.suppress(ValueError):
            values[key] = read_value(text)
    return values


def _turns_off_qat(given: list[str]) -> bool:
    """Whether the keys set enable_qat: false, in any spelling."""
    value = _values(given).get("enable_qat")
    try:
        return value is not None and not Qat.model_validate({"enable_qat": value}).enable_qat
    except ValidationError:  # refused as the job is loaded
        return False


def _compared(job: JobConfig, folder: Path, dtype: torch.dtype) -> str:
    """Compare a quantized folder with its source under fake quantization, and describe it; if
    this machine cannot, return why.

    Raises:
        TrainingError: when they do not compute the same.
    """
    model = build(job)
    size = sum(p.numel() * (p.element_size() + dtype.itemsize) for p in model.parameters())
    needed, free = size / GIB, psutil.virtual_memory().available / GIB
    tokens = _tokens(model, job)
    if tokens is None:
        return f"not compared: {NO_GPU}"
    if needed > free:
        return f"not compared: that takes {needed:.1f} GiB of memory, and {free:.1f} are free"
    model, _ = _prepared(job)
    weights.load_pretrained(model, job, CPU)
    tokens = tokens.unsqueeze(0)
    reference = converted_logits(model, job, tokens, dtype)
    attention = model.config._attn_implementation
    del model
    try:
        found = compare_converted(folder, job, tokens, reference, attention)
    except TrainingError as error:
        what = "the quantized model does not compute what its source does with fake quantization"
        raise TrainingError(what, error.found, DEFECT) from error
    return _difference(found.difference, found.how, "the source's")


def _difference(difference: float, how: str, whose: str) -> str:
    return f"logits differ by {difference:.3g} from {whose} with fake quantization ({how})"


def _nothing_to_quantize(found: str) -> JobError:
    return JobError(
        "enable_qat: true is missing: nothing would be quantized",
        found,
        "write enable_qat=true, and how: qat_weight_dtype=int4 qat_activation_dtype=int8 "
        "qat_group_size=32",
    )


def _new(path: Path) -> Path:
    if path.exists():
        raise JobError(
            f"{path} exists already", "nothing is overwritten", "name another folder by --output"
        )
    return path


def _not_mergeable(found: str) -> JobError:
    fix = "leave --merge out, or name the output_dir of a LoRA run"
    return JobError("--merge has nothing to merge", found, fix)


def _merge_run(
    folder: Path, stored: Mapping[str, Any], checkpoint_name: str, output: str, given: list[str]
) -> None:
    """Write a checkpoint's adapter and its base as one model."""
    if given:
        raise _not_mergeable(f"{', '.join(given)}: a merged model is not quantized")
    job = _job_of(folder, stored, [])
    if job.transform(Qat).enabled:
        raise JobError(
            "An adapter trained with QAT cannot be merged",
            "it was trained on the rounded base, and rounding the sum of both puts back the error "
            "that training has taken out",
            "leave --merge out: model-quantized holds the rounded base and the adapter",
        )
    if not job.transform(Lora).enabled:
        raise _not_mergeable(f"finetuning_type: full in {folder / RUN_FILE}")
    found = _checkpoint(job, checkpoint_name)
    out = _new(Path(output) if output else folder / f"merged-step_{found.progress.step}") / "model"
    model = _loaded(job, found)
    way_out = "make room, or name another folder by --output"
    merged = export_merged(model, job, out, load_tokenizer(job), _any_tokens(model), way_out)
    print(f"merged     {out} ({disk(merged.gib)}; step {found.progress.step:,})")
    base = job.transform(QuantizedBase)
    if base.enabled:
        print(
            f"           the adapter and its base as they were trained: {base.scheme}, written "
            "whole\n           the quantization stays in the weights"
        )
        if base.form.kind == "fp4":
            # tests/gpu/test_quantized_base_on_gpu.py; nf4 is rounded alike on both.
            print(
                "           bitsandbytes rounds fp4 here, on a CPU, otherwise than on a GPU: if "
                "the run had GPUs,\n           1 % of the base's values are a step off those "
                "the adapter was trained on; nf4's are not"
            )
    print(
        f"           logits differ by {merged.difference:.3g} at most from those of base and "
        f"adapter, whose largest is {merged.largest:.3g}\n"
        f"           ({merged.num_tokens} tokens; sums are rounded to the written dtype)"
    )
    if merged.plain_difference is not None:
        print(
            "           merged into the weights as they were before, they would differ by "
            f"{merged.plain_difference:.3g}"
        )


def _job_of(folder: Path, stored: Mapping[str, Any], given: list[str]) -> JobConfig:
    """Return a run's job, without what only matters in training."""
    kept = {key for kind in KEPT for key in kind.model_fields}
    others = {key for kind in transform_types() for key in kind.model_fields} - kept
    is_off = _turns_off_qat(given)
    dropped = others | set(Qat.model_fields if is_off else ())
    keys = {key: value for key, value in stored.items() if key not in dropped}
    attention = str(keys.get("flash_attn", ""))
    if attention in ("fa2", "fa3") or attention.startswith("hub:"):
        keys["flash_attn"] = "auto"  # nothing is trained here, and it may be for GPUs alone
    job = load_keys({**keys, "output_dir": str(folder)}, str(folder / RUN_FILE), given)
    if given and not is_off and not job.transform(Qat).enabled:
        raise _nothing_to_quantize(f"{', '.join(given)}; the run has enable_qat: false")
    return job


def _export_run(
    folder: Path, stored: Mapping[str, Any], checkpoint_name: str, output: str, given: list[str]
) -> None:
    """Write a checkpoint's model, and the quantized one if the run's keys or these ask for it."""
    job = _job_of(folder, stored, given)
    found = _checkpoint(job, checkpoint_name)
    step = found.progress.step
    out = _new(Path(output) if output else folder / f"exported-step_{step}")
    model = _loaded(job, found)
    written = export_model(model, job, out / "model", load_tokenizer(job), _tokens(model, job))
    print(f"model      {written.model_dir} ({disk(written.model_gib or 0.0)}; step {step:,})")
    if not written.converted:
        return
    figures = written.converted
    print(f"quantized  {figures['quantized_dir']} ({disk(figures['quantized_gib'])})")
    print(f"           {job.transform(Qat).scheme}")
    if figures["quantized_logit_difference"] is None:
        print(f"           not compared: {NO_GPU}")
    else:
        difference, how = figures["quantized_logit_difference"], figures["quantized_comparison"]
        print("           " + _difference(difference, how, "the checkpoint's"))


def _checkpoint(job: JobConfig, name: str) -> Found:
    """Return the complete checkpoint that is meant: by step, by path, or the newest.

    Raises:
        JobError: when there is none, naming those there are; when it is damaged.
    """
    root = Storage.at(storage_path(job))
    if name and ("/" in name or Path(name).is_dir()):
        found = find(Storage.at(name))
    else:
        digits = name.removeprefix("step_")
        folders = sorted(all_folders(root), key=lambda entry: entry[:2], reverse=True)
        steps = [f for f in folders if not name or (digits.isdigit() and f[0] == int(digits))]
        found = next((one for *_, f in steps if (one := find(f)) is not None), None)
    if found is not None:
        if damage := wrong_bytes(found.storage, rank=0, world_size=1):
            fix = "name another one with --checkpoint"
            raise JobError("the checkpoint is damaged", f"{found.path}: {damage}", fix)
        return found
    whole = {step for step, _, f in all_folders(root) if find(f) is not None}
    if not whole:
        run = job.output.output_dir
        export = f"quantize its model: raytrain-adv export {run}/model --output DIR enable_qat=true"
        fix = export if (Path(run) / "model").is_dir() else "run it to its end"
        fix += "; or run with save_strategy: steps"
        raise JobError("the run has no complete checkpoint", f"none in {root.root}", fix)
    listed = ", ".join(f"step_{step}" for step in sorted(whole))
    raise JobError(f"there is no complete checkpoint {name}", f"there are {listed}", "name one")


def _loaded(job: JobConfig, found: Found) -> PreTrainedModel:
    """Return the checkpoint's model in host memory, with its adapters and fake quantization."""
    model, plans = _prepared(job)
    if job.transform(Lora).enabled:
        weights.load_pretrained(model, job, CPU)
    Transforms(job).initialize(model, plans, job.train.seed)
    with warnings.catch_warnings():  # PyTorch's, that there is one process: so it is meant
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save.load(found, model)
    return model


def _prepared(job: JobConfig) -> tuple[PreTrainedModel, dict[str, Plan]]:
    """Return the job's model in host memory, prepared, and what was planned; its weights have yet
    to be loaded.
    """
    facts = hardware.detect(CPU)
    if job.transform(QuantizedBase).enabled:
        job.transform(QuantizedBase).check(facts)
    model = build(job)
    plans = Transforms(job).prepare(model, facts)
    weights.materialize(model, CPU)
    return model, plans


def _tokens(model: PreTrainedModel, job: JobConfig) -> torch.Tensor | None:
    """Return token ids to compare the quantized model on, any that the model knows; none where it
    does not run without a GPU.
    """
    if job.transform(Qat).activation_dtype == FLOAT8:
        return None
    return _any_tokens(model)


def _any_tokens(model: PreTrainedModel) -> torch.Tensor:
    config: Any = model.config.get_text_config()
    number = min(MOST_TOKENS, getattr(config, "max_position_embeddings", MOST_TOKENS))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(int(config.vocab_size), (number,), generator=generator)
