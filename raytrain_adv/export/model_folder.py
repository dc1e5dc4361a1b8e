"""The trained model as a Hugging Face folder, gathered by tensors, in the checkpoint's layout."""

import copy
import json
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from raytrain_adv.config import JobConfig
from raytrain_adv.dtensor import gather, reshard
from raytrain_adv.errors import no_panics
from raytrain_adv.export.convert import add_adapter, copy_others, write_converted
from raytrain_adv.export.folder import (
    MAX_FILE_BYTES,
    NewFolder,
    TensorFiles,
    folder_gib,
    save_tensors,
)
from raytrain_adv.export.verify import (
    Comparison,
    compare_converted,
    compared_tokens,
    converted_logits,
)
from raytrain_adv.model.adapter import base_fingerprint, peft_names, trained
from raytrain_adv.model.attention import attention_of_parts
from raytrain_adv.model.build import build, build_whole, keeps_float32
from raytrain_adv.model.config_file import read_config
from raytrain_adv.model.conversion import save_groups
from raytrain_adv.model.files import is_local, model_source
from raytrain_adv.model.parallel import compute_dtype
from raytrain_adv.model.vocabulary import new_rows
from raytrain_adv.model.weight_files import CheckpointFiles, model_folder
from raytrain_adv.model.weights import match, saved_tensors
from raytrain_adv.ops import low_rank
from raytrain_adv.ops.absent import is_absent
from raytrain_adv.ops.fake_quant.merged import Merging
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.lora import ADAPTER, Lora
from raytrain_adv.transforms.targets import ADAPTER_FILE, BASE, OWN, fingerprint
from raytrain_adv.worker.finish import Exported


def export_model(
    model: PreTrainedModel,
    job: JobConfig,
    out_dir: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    input_ids: torch.Tensor | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Exported:
    """Write the model as a folder that loads with AutoModelForCausalLM; every rank calls this.

    Weights are bfloat16 for a run in bf16 or pure_bf16, otherwise float32. A LoRA run writes its
    adapters in PEFT's format. Rank 0 holds one file's tensors in host memory, every rank one whole
    tensor on its device. A feature that converts the model writes a second folder from these files.

    `out_dir` is replaced if it exists. `input_ids` are [tokens], held-out ones, on which rank 0
    compares the converted model; none skips that. Raises on every rank: StorageError when writing
    failed, TrainingError when the converted model does not compute what was trained. Then nothing
    is left under the folder's name.
    """
    device = collective_device(model)
    base = write_base(model, job, out_dir, tokenizer, device, max_file_bytes)
    new = NewFolder(out_dir, device)
    if job.transform(Lora).enabled:
        write_adapter(model, job, new, base)
    else:
        trained = saved_tensors(model)
        write_model(lambda name: gather(trained[name]), job, new, max_file_bytes)
    if tokenizer is not None:
        new.run(lambda: save_tokenizer(tokenizer, new.partial))
    new.publish()
    written = Exported(str(out_dir), folder_gib(out_dir) if new.writes else None)
    kind = Transforms(job).converts
    if not kind:
        return written
    converted = NewFolder(out_dir.with_name(f"{out_dir.name}-{kind}"), device)
    compared = export_converted(model, job, out_dir, converted, input_ids, max_file_bytes)
    found = {
        "dir": str(converted.path),
        "gib": folder_gib(converted.path) if new.writes else None,
        "logit_difference": compared.difference if compared else None,
        "comparison": compared.how if compared else "",
    }
    return replace(written, converted={f"{kind}_{name}": x for name, x in found.items()})


def write_base(
    model: PreTrainedModel,
    job: JobConfig,
    out_dir: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device,
    max_file_bytes: int,
) -> Path | None:
    """Write the frozen model that the adapter belongs to, if it is not the job's: adapters
    were merged into it, or PiSSA took out what its adapters started with; a collective.
    """
    if not job.transform(Lora).changes_base:
        return None
    new = NewFolder(out_dir.with_name(f"{out_dir.name}-base"), device)
    held = saved_tensors(model)
    write_model(lambda name: gather(held[name]), job, new, max_file_bytes)
    if tokenizer is not None:
        new.run(lambda: save_tokenizer(tokenizer, new.partial))
    new.publish()
    return new.path


def write_adapter(
    model: PreTrainedModel, job: JobConfig, new: NewFolder, base: Path | None = None
) -> None:
    """Gather the adapters and write them in PEFT's format on rank 0; a collective. `base` is the
    folder of the model that they belong to, if it is not the job's.
    """
    reshard(model)
    tensors: dict[str, torch.Tensor] = {}
    convert, peft_name = job.transform(Lora).pissa_init and base is None, peft_names(model)
    started = {
        peft_name(f"{fqn}.lora_{part}.{ADAPTER}.weight"): (layer, part)
        for fqn, layer in low_rank.started(model)
        for part in "AB"
        if convert
    }
    for name, parameter in trained(model).items():
        whole = gather(parameter)
        if name in started:
            layer, part = started[name]
            whole = low_rank.converted(layer, part, whole)
        if new.writes:
            tensors[name] = whole.cpu().contiguous()
    config: Any = copy.copy(model.peft_config[ADAPTER])
    if convert:
        config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2
        config.r *= 2
    local, source = base is not None or is_local(job), str(base or model_source(job))
    config.base_model_name_or_path = str(Path(source).resolve()) if local else source
    config.revision = None if local else job.model.model_revision
    config.inference_mode = True
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True
    new.require(sum(tensor.nbytes for tensor in tensors.values()))
    new.run(lambda: save_tensors(tensors, new.partial / ADAPTER_FILE, belongs_to(job, base)))
    new.run(lambda: config.save_pretrained(str(new.partial)))


def belongs_to(job: JobConfig, base: Path | None) -> dict[str, str]:
    """Return the fingerprints of the job's model, and of the base that was written for the adapter,
    as metadata of its file.
    """
    return {BASE: base_fingerprint(job), **({OWN: fingerprint([base])} if base else {})}


def export_converted(
    model: PreTrainedModel,
    job: JobConfig,
    model_dir: Path,
    new: NewFolder,
    input_ids: torch.Tensor | None,
    max_file_bytes: int,
) -> Comparison | None:
    """Convert the exported model into a folder, and compare them on rank 0; all ranks call it.

    A LoRA run's base is converted and its adapter copied: merging would round their sum again and
    restore the error that training has removed. If training rounds the sum itself, the merged model
    is written beside `model_dir`, and converted. Raises on every rank: TrainingError when the
    folder does not compute what was trained, StorageError when it could not be written. Then
    nothing is left under its name.
    """
    adapted = job.transform(Lora).enabled
    source = (source_folder(job) if adapted else None) or model_dir
    merging = Merging(model, gather, compute_dtype(job))
    if merging.bases:
        source, adapted = model_dir.with_name(f"{model_dir.name}-merged"), False
        write_merged(model, job, merging, model_dir, NewFolder(source, new.device), max_file_bytes)
    reference = tokens = None
    if input_ids is not None:
        tokens = compared_tokens(model, input_ids).to(new.device)
        reference = converted_logits(model, job, tokens)
    comparisons: list[Comparison] = []

    def write() -> None:
        dtype = compute_dtype(job)
        write_converted(
            source,
            new.partial,
            job,
            dtype,
            new.device,
            max_file_bytes,
            new.require_now,
            model_dir if adapted else None,
        )
        if adapted:
            add_adapter(model_dir, new.partial, new.path)

    def compare() -> None:
        if tokens is not None and reference is not None:
            attention = attention_of_parts(model)
            comparisons.append(compare_converted(new.partial, job, tokens, reference, attention))

    new.run(write)
    new.run(compare)
    new.publish()
    if not comparisons or not merging.bases:
        return comparisons[0] if comparisons else None
    return replace(comparisons[0], how=f"{comparisons[0].how}; {merging.describe()}")


def write_merged(
    model: PreTrainedModel,
    job: JobConfig,
    merging: Merging,
    adapter: Path,
    new: NewFolder,
    max_file_bytes: int,
) -> None:
    """Write the model with each adapter in its base, not yet rounded, and the tokenizer of the
    folder `adapter`; every rank calls this.
    """
    trained = saved_tensors(model)

    def value(name: str) -> torch.Tensor:
        return merging.weight(name) if name in merging.bases else gather(trained[name])

    write_model(value, job, new, max_file_bytes)
    new.run(lambda: copy_others(adapter, new.partial))
    new.publish()


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files, with its chat template, and have generation end at its eos token,
    which the job's template may have set: transformers' generate() does not ask the tokenizer.
    Raises JobError where Rust panics, which would leave the other ranks waiting.
    """
    with no_panics(f"writing the tokenizer to {folder}"):
        tokenizer.save_pretrained(str(folder))
    generates, end = folder / "generation_config.json", tokenizer.eos_token_id
    if end is None or not generates.is_file():
        return
    values = json.loads(generates.read_text())
    stops = values.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if end not in stops:
        values["eos_token_id"] = [*stops, end] if stops else end
        generates.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def collective_device(model: PreTrainedModel) -> torch.device:
    """Return the device on which the model's collectives run."""
    parameter = next(model.parameters())
    if not isinstance(parameter, DTensor):
        return parameter.device
    kind = parameter.device_mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def write_model(
    whole_tensor: Callable[[str], torch.Tensor], job: JobConfig, new: NewFolder, max_file_bytes: int
) -> None:
    """Gather the weights group by group; write them and the configs on rank 0, under the names that
    the checkpoint has for them, with its parts that were not built as they are.
    """
    plain, trained, dtype = build_whole(job), build(job), compute_dtype(job)
    wanted, keeps = saved_tensors(plain), keeps_float32(plain)
    stored = {
        name: (torch.float32 if keeps(name) else dtype) if t.is_floating_point() else t.dtype
        for name, t in wanted.items()
    }
    new.require(sum(t.numel() * stored[name].itemsize for name, t in wanted.items()))
    files = TensorFiles(new.partial, max_file_bytes)
    with ExitStack() as opened:
        source, names = None, dict[str, str]()
        if (folder := source_folder(job)) is not None and not job.model.train_from_scratch:
            source = opened.enter_context(CheckpointFiles(folder, new_rows(job)))
            names = match(plain, source).direct
        for group in save_groups(plain, saved_tensors(trained)):
            whole: dict[str, torch.Tensor] = {}
            for name, _ in group.sources:
                tensor = whole_tensor(name)
                if new.writes and new.failure is None:
                    whole[name] = tensor.to(stored[name]).cpu()
                del tensor

            def add(held: Mapping[str, torch.Tensor] = whole, group: Any = group) -> None:
                first = names.get(group.sources[0][0]) if group.converter is None else None
                for name, value in group.convert(held.__getitem__, plain).items():
                    files.add(first or name, value)

            new.run(add)
        if source is not None:
            new.run(lambda: copy_unbuilt(source, files, job, trained))
        new.run(files.close)
    new.run(lambda: write_configs(plain, job, dtype, new.partial))


def copy_unbuilt(
    source: CheckpointFiles, files: TensorFiles, job: JobConfig, trained: PreTrainedModel
) -> None:
    """Copy the tensors of parts that were not built, under their names and in their dtype."""
    found = match(build_whole(job), source)
    for target, name in found.direct.items():
        if is_absent(target, trained):
            files.add(name, source.read(name))
    for group in found.groups:
        if is_absent(group.first_target, trained):
            for name, _ in group.sources:
                files.add(name, source.read(name))


def write_configs(plain: PreTrainedModel, job: JobConfig, dtype: torch.dtype, folder: Path) -> None:
    """Write config.json, generation_config.json, and model code that came with the checkpoint."""
    original = read_config(job)
    config: PretrainedConfig = copy.deepcopy(plain.config)
    config.architectures = [type(plain).__name__]
    config.dtype = dtype
    if "use_cache" in original.get_text_config().to_dict():
        config.use_cache = original.get_text_config().use_cache
    config.save_pretrained(str(folder))
    source = source_folder(job)
    if source is not None and (source / "generation_config.json").is_file():
        # Copied as it is: writing it again would refuse values that older checkpoints have.
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
    else:
        GenerationConfig.from_model_config(config).save_pretrained(str(folder))
    if source is not None:
        code = ["*.py"] if job.model.trust_remote_code else []
        copy_others(source, folder, ["*processor_config.json", *code])


def source_folder(job: JobConfig) -> Path | None:
    """Return the folder the model came from; none for a Hub shape trained from scratch."""
    if is_local(job):
        return Path(model_source(job))
    return None if job.model.train_from_scratch else model_folder(job)
