"""`raytrain-adv export`: model folders from a run's checkpoint, or a quantized one from any model
folder; one process, in host memory, without Ray.
"""

import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from raytrain_adv import hardware
from raytrain_adv.checkpoint import save
from raytrain_adv.checkpoint.folders import Found, all_folders, find, wrong_bytes
from raytrain_adv.checkpoint.resume import refuse_other_base
from raytrain_adv.config.job import JobConfig, transform_types
from raytrain_adv.config.load import load_keys
from raytrain_adv.config.problems import ON_COMMAND_LINE, Problem, job_error
from raytrain_adv.data.tokens.tokenizer import load_tokenizer
from raytrain_adv.driver.commands.verify import TAIL, run_script
from raytrain_adv.driver.output.output_dir import runs_in, storage_path
from raytrain_adv.driver.output.replaced import RUN_FILE
from raytrain_adv.errors import JobError, StorageError, TrainingError
from raytrain_adv.export.convert import write_converted
from raytrain_adv.export.folder import NewFolder, folder_gib
from raytrain_adv.export.merge import export_merged
from raytrain_adv.export.model_folder import export_model
from raytrain_adv.export.reference import sample_tokens
from raytrain_adv.export.verify import MOST_TOKENS, compare_converted, converted_logits
from raytrain_adv.model import weights
from raytrain_adv.model.adapter import merge_adapters, require_same_base, without_continued
from raytrain_adv.model.attention import attention_of_parts
from raytrain_adv.model.build import build
from raytrain_adv.model.config_file import read_config
from raytrain_adv.model.files import nearest_folders
from raytrain_adv.ops.fake_quant.targets import FLOAT8, NO_TARGET, TARGETS
from raytrain_adv.report.card import write_card
from raytrain_adv.report.record import report_of
from raytrain_adv.storage.metrics_file import FILE_NAME, best_step, read
from raytrain_adv.storage.storage import Storage
from raytrain_adv.text import GIB, disk, listed, percent, plural
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.lora import Lora
from raytrain_adv.transforms.qat import Qat
from raytrain_adv.transforms.quantized_base import QuantizedBase
from raytrain_adv.transforms.transform import DEFECT, Plan
from raytrain_adv.transforms.vocabulary import Vocabulary

CPU = torch.device("cpu")
FALSE = ("false", "no", "off", "0", "f", "n")
MEANINGLESS = frozenset({"compare", "fake_quant_after_n_steps"})
"""QAT keys that only affect training."""
TRAINS = "affects only how a model is trained"
WAY_OUT = "make room, or name another folder by --output"
INDENT = " " * 11
PROGRAM = "model.pte"
NO_GPU = "float8 products need a GPU, and this command has none"
KEPT = (Lora, Qat, QuantizedBase, Vocabulary)
"""Transforms whose keys matter when there is nothing to train."""
OF_ANY = {"enable_qat", "qat_exclude", "qat_lora"}  # keys of QAT for any target


def run(
    source: str, checkpoint_name: str, output: str, overrides: Sequence[str], merge: bool = False
) -> None:
    """Write model folders, and print them. Raises JobError, StorageError and TrainingError.

    Args:
        source: a run's output_dir, or a model folder.
        checkpoint_name: step_N or a path, for a run; empty takes the newest.
        output: the folder to write; empty stands for one in the run's.
        overrides: QAT keys as key=value.
        merge: write one model, with the adapter of a LoRA run merged into its base.
    """
    folder = Path(source).expanduser()
    given = list(overrides)
    _refuse_other_keys(given)
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
        raise StorageError(error.what, error.found, WAY_OUT) from error


def refuse_unwritable(source: str, output: str, given: list[str]) -> None:
    """Raise JobError when run would not convert a model by these keys; nothing is written."""
    _refuse_other_keys(given)
    folder = Path(source).expanduser()
    record = Storage.at(str(folder)).read_json(RUN_FILE) if folder.is_dir() else None
    if record is not None:
        job = job_of(folder, record["job"], given)
    elif (folder / "config.json").is_file():
        job, _ = _folder_job(folder, output, given)
    else:
        raise _neither(source, folder)
    Transforms(without_continued(job)).plan(build(job))


def _refuse_other_keys(given: list[str]) -> None:
    allowed = {*Qat.model_fields, "trust_remote_code"} - MEANINGLESS
    fix = f"leave it out; there are {', '.join(sorted(allowed))}"
    problems = [
        Problem("is not a key of this command" if key not in MEANINGLESS else TRAINS, fix, key)
        for key in (item.partition("=")[0] for item in given)
        if key not in allowed
    ]
    if problems:
        raise job_error(ON_COMMAND_LINE, problems)


def _neither(source: str, folder: Path) -> JobError:
    fix = f"name a folder that holds {RUN_FILE}, or one that holds config.json and safetensors"
    runs = [path for path in folder.absolute().parents if (path / RUN_FILE).is_file()]
    below = runs_in(folder)
    if runs:
        found = f"it lies in the run {runs[0]}"
        fix = f"raytrain-adv export {runs[0]}, with --checkpoint for one that is not its newest"
    elif not folder.is_dir():
        found = nearest_folders(folder)
    else:
        found = f"it holds {listed(sorted(p.name for p in folder.iterdir()), 8) or 'nothing'}"
        fix = f"name one of the runs in it: {listed(list(map(str, below)), 4)}" if below else fix
    return JobError(f"{source} is neither a run's output_dir nor a model folder", found, fix)


def _export_folder(source: Path, checkpoint_name: str, output: str, given: list[str]) -> None:
    """Quantize a model folder as it is (PTQ)."""
    if checkpoint_name:
        fix = "leave --checkpoint out, or name the output_dir of a run"
        raise JobError("a model folder has no checkpoints", f"--checkpoint {checkpoint_name}", fix)
    if not output:
        raise JobError("--output is missing", str(source), "name the new folder: --output DIR")
    job, dtype = _folder_job(source, output, given)
    if not job.transform(Qat).enabled:
        raise _nothing_to_quantize(f"{source} is a model folder already")
    target = _new(Path(output))
    new = NewFolder(target, CPU)
    new.run(lambda: write_converted(source, new.partial, job, dtype, CPU, require=new.require_now))
    compared: list[str] = []
    new.run(lambda: compared.append(_compared(job, new.partial, dtype)))
    new.publish()
    write_card(target, job, note="Converted without training for it (PTQ).")
    before = sum(f.stat().st_size for f in source.glob("*.safetensors")) / GIB
    sizes = f"{disk(folder_gib(target))}; the weights of {source}: {disk(before)}"
    print(f"quantized  {target} ({sizes})")
    print(f"{INDENT}{job.transform(Qat).scheme}; not trained for it (PTQ)")
    print(f"{INDENT}{compared[0]}")
    _write_program(target, job)


def _folder_job(source: Path, output: str, given: list[str]) -> tuple[JobConfig, torch.dtype]:
    """Return the job that converts a model folder, and the dtype of the folder's weights."""
    keys: dict[str, Any] = {"model_name_or_path": str(source), "output_dir": output}
    keys |= {"finetuning_type": "full", "dataset": "none"}
    code = [item for item in given if item.startswith("trust_remote_code=")]
    stored = read_config(load_keys(keys, str(source), code)).dtype
    dtype = stored if isinstance(stored, torch.dtype) else torch.float32
    default = TARGETS.get(_text(given, "qat_target"), NO_TARGET).activation_dtypes[0]
    if dtype != torch.bfloat16 and (_text(given, "qat_activation_dtype") or default) == FLOAT8:
        raise JobError(
            "float8 activations need a model in bfloat16: products of float8 rows come out in it",
            f"{source} is in {str(dtype).removeprefix('torch.')}",
            "set qat_activation_dtype=none, or give a bfloat16 copy of the model",
        )
    keys["pure_bf16"] = dtype == torch.bfloat16
    return load_keys(keys, str(source), given), dtype


def _text(given: list[str], key: str) -> str:
    """Return what a key is set to, as text; empty if it is not given."""
    return dict(item.partition("=")[::2] for item in given).get(key, "").strip(" '\"").lower()


def _compared(job: JobConfig, folder: Path, dtype: torch.dtype) -> str:
    """Compare a quantized folder with its source under fake quantization; else return why not."""
    if _needs_gpu(job):
        return f"not compared: {NO_GPU}"
    sizes = (p.numel() * (p.element_size() + dtype.itemsize) for p in build(job).parameters())
    needed, free = sum(sizes) / GIB, psutil.virtual_memory().available / GIB
    if needed > free:
        return f"not compared: that takes {needed:.1f} GiB of memory, and {free:.1f} are free"
    model, _ = prepared_model(job)
    weights.load_pretrained(model, job, CPU)
    tokens = sample_tokens(model, job, MOST_TOKENS).unsqueeze(0)
    reference = converted_logits(model, job, tokens, dtype)
    attention = attention_of_parts(model)
    del model
    try:
        found = compare_converted(folder, job, tokens, reference, attention)
    except TrainingError as error:
        what = "the quantized model does not compute what its source does with fake quantization"
        raise TrainingError(what, error.found, DEFECT) from error
    return _difference(found.difference, found.how, "the source's")


def _difference(difference: float | None, how: str, whose: str) -> str:
    if difference is None:
        return how
    return f"logits differ by {difference:.3g} from {whose} with fake quantization ({how})"


def _nothing_to_quantize(found: str) -> JobError:
    keys = "qat_weight_dtype=int4 qat_activation_dtype=int8 qat_group_size=32"
    what = "enable_qat: true is missing: nothing would be quantized"
    return JobError(what, found, f"write enable_qat=true, and how: {keys}")


def _new(path: Path) -> Path:
    if path.exists():
        fix = "name another folder by --output"
        raise JobError(f"{path} exists already", "nothing is overwritten", fix)
    return path


def _not_mergeable(found: str) -> JobError:
    fix = "leave --merge out, or name the output_dir of a LoRA run"
    return JobError("--merge has nothing to merge", found, fix)


def _merge_run(
    folder: Path, stored: Mapping[str, Any], checkpoint_name: str, output: str, given: list[str]
) -> None:
    if given:
        raise _not_mergeable(f"{', '.join(given)}: a merged model is not quantized")
    job = job_of(folder, stored, [])
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
    tokens = sample_tokens(model, job, MOST_TOKENS)
    merged = export_merged(model, job, out, load_tokenizer(job), tokens, WAY_OUT)
    report = report_of(folder, found.progress.step)
    write_card(out, job, report, "The adapter is merged into its base.")
    lines = []
    base = job.transform(QuantizedBase)
    if base.enabled:
        lines.append(f"the adapter and its base as they were trained: {base.scheme}, written whole")
        lines.append("the quantization stays in the weights")
    if base.enabled and base.form.kind == "fp4":
        # tests/gpu/test_quantized_base_on_gpu.py; nf4 is rounded alike on both.
        lines.append("bitsandbytes rounds fp4 here, on a CPU, otherwise than on a GPU: if the run")
        lines.append("had GPUs, 1 % of the base's values are a step off those the adapter was")
        lines.append("trained on; nf4's are not")
    most, largest = f"{merged.difference:.3g} at most", f"{merged.largest:.3g}"
    lines.append(
        f"logits differ by {most} from those of base and adapter, whose largest is {largest}"
    )
    lines.append(f"({merged.num_tokens} tokens; sums are rounded to the written dtype);")
    if merged.num_rerouted:
        moved = plural(merged.num_rerouted, "token")
        lines.append(f"routed as in training: rounding sends {moved} through other experts;")
    lines.append(f"the likeliest token is the same at {percent(merged.same_choice)} of them")
    if merged.plain_difference is not None:
        difference = f"they would differ by {merged.plain_difference:.3g}"
        lines.append(f"merged into the weights as they were before, {difference}")
    print(f"merged     {out} ({disk(merged.gib)}; step {found.progress.step:,})")
    print("\n".join(INDENT + line for line in lines))


def job_of(folder: Path, stored: Mapping[str, Any], given: list[str]) -> JobConfig:
    """Return a run's job, without what only matters in training."""
    dropped = {key for k in transform_types() if k not in KEPT for key in k.model_fields}
    is_off = _text(given, "enable_qat") in FALSE
    if is_off or _text(given, "qat_target") not in ("", stored.get("qat_target")):
        dropped |= Qat.model_fields.keys() - (set() if is_off else OF_ANY)
    keys = {key: value for key, value in stored.items() if key not in dropped}
    if str(keys.get("flash_attn", "")).startswith(("fa2", "fa3", "hub:")):
        keys["flash_attn"] = "auto"  # nothing is trained here, and it may be for GPUs alone
    job = load_keys({**keys, "output_dir": str(folder)}, str(folder / RUN_FILE), given)
    if given and not is_off and not job.transform(Qat).enabled:
        raise _nothing_to_quantize(f"{', '.join(given)}; the run has enable_qat: false")
    return job


def _export_run(
    folder: Path, stored: Mapping[str, Any], checkpoint_name: str, output: str, given: list[str]
) -> None:
    job = job_of(folder, stored, given)
    found = _checkpoint(job, checkpoint_name)
    step = found.progress.step
    out = _new(Path(output) if output else folder / f"exported-step_{step}")
    model = _loaded(job, found)
    tokens = None if _needs_gpu(job) else sample_tokens(model, job, MOST_TOKENS)
    written = export_model(model, job, out / "model", load_tokenizer(job), tokens)
    report = report_of(folder, found.progress.step)
    if report is not None:
        report = report.model_copy(update={"model_dir": written.model_dir, **written.converted})
    for path in (out / "model", *(Path(d) for d in written.folders)):
        write_card(path, job, report, f"Exported from the checkpoint of step {step:,}.")
    print(f"model      {written.model_dir} ({disk(written.model_gib or 0.0)}; step {step:,})")
    if job.transform(Lora).changes_base:
        print(f"base       {out / 'model-base'} (what the adapter belongs to)")
    if not written.converted:
        return
    figures = written.converted
    print(f"quantized  {figures['quantized_dir']} ({disk(figures['quantized_gib'])})")
    print(INDENT + job.transform(Qat).scheme)
    difference, how = figures["quantized_logit_difference"], figures["quantized_comparison"]
    not_compared = f"not compared: {NO_GPU}"
    print(INDENT + (_difference(difference, how, "the checkpoint's") if how else not_compared))
    _write_program(Path(str(figures["quantized_dir"])), job)


def _write_program(folder: Path, job: JobConfig) -> None:
    """Write the program of a folder that is for ExecuTorch, if it is installed here, and print what
    was done. Raises TrainingError when ExecuTorch does not take the model.
    """
    if job.transform(Qat).target.engine != "ExecuTorch":
        return
    if find_spec("executorch") is None:
        print(f"{INDENT}{PROGRAM} is not written, as executorch is not installed here; this does:")
        print(f"{INDENT}raytrain-adv verify {folder} --engine executorch --python FILE")
        return
    ran = run_script("lower_executorch.py", folder, "")
    if ran.returncode:
        raise TrainingError(f"ExecuTorch wrote no {PROGRAM}", ran.stderr[-TAIL:], DEFECT)
    print(f"{INDENT}{PROGRAM} ({disk((folder / PROGRAM).stat().st_size / GIB)})")


def _checkpoint(job: JobConfig, name: str) -> Found:
    """Return the checkpoint that is meant, by step or path; else that of the model that the run
    exported as its best, or the newest. Raises JobError.
    """
    if not name and (best := best_step(read(Path(job.output.output_dir) / FILE_NAME))) is not None:
        name = f"step_{best}"
    root = Storage.at(storage_path(job))
    folders = all_folders(root)
    if name and ("/" in name or Path(name).is_dir()):
        found = find(Storage.at(name))
    else:
        digits = name.removeprefix("step_")
        steps = [f for f in folders if not name or (digits.isdigit() and f[0] == int(digits))]
        found = next((one for *_, f in steps if (one := find(f)) is not None), None)
    if found is not None:
        if damage := wrong_bytes(found.storage, rank=0, world_size=1):
            fix = "name another one with --checkpoint"
            raise JobError("the checkpoint is damaged", f"{found.path}: {damage}", fix)
        return found
    whole = sorted({step for step, _, f in folders if find(f) is not None})
    if not whole:
        run = job.output.output_dir
        export = f"quantize its model: raytrain-adv export {run}/model --output DIR enable_qat=true"
        fix = export if (Path(run) / "model").is_dir() else "run it to its end"
        fix += "; or run with save_strategy: steps"
        raise JobError("the run has no complete checkpoint", f"none in {root.root}", fix)
    there = f"there are {', '.join(f'step_{step}' for step in whole)}"
    raise JobError(f"there is no complete checkpoint {name}", there, "name one")


def _loaded(job: JobConfig, found: Found) -> PreTrainedModel:
    """Return the checkpoint's model in host memory, with its adapters and fake quantization."""
    model, plans = prepared_model(job)
    if job.transform(Lora).enabled:
        require_same_base(Path(job.output.output_dir) / "model", job)
        refuse_other_base(job, found)
        weights.load_pretrained(model, job, CPU)
        merge_adapters(model, job)
    Transforms(job).initialize(model, plans, job.train.seed)
    with warnings.catch_warnings():  # PyTorch's, that there is one process: so it is meant
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save.load(found, model)
    Transforms(job).after_step(model)
    return model


def prepared_model(job: JobConfig) -> tuple[PreTrainedModel, dict[str, Plan]]:
    """Return the job's model in host memory, prepared but without its weights, and the plans."""
    facts = hardware.detect(CPU)
    if job.transform(QuantizedBase).enabled:
        job.transform(QuantizedBase).check_package(facts)
    model = build(job)
    plans = Transforms(without_continued(job)).prepare(model, facts)
    weights.materialize(model, CPU)
    return model, plans


def _needs_gpu(job: JobConfig) -> bool:
    return job.transform(Qat).activation_dtype == FLOAT8
