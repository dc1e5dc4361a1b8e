"""The model card of an exported folder: README.md, in the form that the Hugging Face Hub reads."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from raytrain_adv import __version__
from raytrain_adv.config.job import JobConfig
from raytrain_adv.model.files import looks_like_hub_name
from raytrain_adv.ops.fake_quant.targets import INTEGERS, UNPACKING, stored_as
from raytrain_adv.ops.loss import perplexity
from raytrain_adv.redaction import hide_environment, redact
from raytrain_adv.report.record import RunReport
from raytrain_adv.storage.atomic import write_atomic
from raytrain_adv.storage.storage import storage_errors
from raytrain_adv.text import split_names

FILE_NAME = "README.md"
OF_MACHINES = (
    "ray_",
    "hub_",
    "push_to_hub",
    "output_dir",
    "cache_dir",
    "tokenized_path",
    "report_to",
)
"""Beginnings of keys that tell of the machines a model was trained on, not of the model."""
ENGINES = "compressed-tensors"


def write_cards(report: RunReport, job: JobConfig) -> None:
    """Write the cards of a finished run's folders, with its figures. Raises StorageError."""
    for folder in (report.model_dir, report.converted[1]):
        if folder is not None and Path(folder).is_dir():
            write_card(Path(folder), job, report)


def write_card(
    folder: Path, job: JobConfig, report: RunReport | None = None, note: str = ""
) -> None:
    """Write the card of one folder. Raises StorageError.

    Args:
        folder: a model, an adapter, or a converted model.
        job: what it was trained, or converted, by.
        report: the run whose last weights it has; none leaves out the figures.
        note: a sentence on how the folder was made.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    figures = dict(_figures(folder, job, report)) if report is not None else {}
    names = _dataset_names(job)
    name = (job.hub.hub_model_id or job.run_name).rpartition("/")[2]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=names[0] if names else "unknown",
            dataset_name=f"held-out rows of {', '.join(names) or 'the data'}",
            metric_type=kind,
            metric_name=f"held-out {kind}",
            metric_value=round(value, 6),
        )
        for kind in ("loss", "perplexity")
        if (value := figures.get(f"held-out {kind}")) is not None and not isinstance(value, str)
    ]
    data = ModelCardData(
        base_model=_hub_base(job),
        datasets=[one for one in names if _is_on_hub(one)] or None,
        library_name="peft" if _is_adapter(folder) else "transformers",
        license=_license(job),
        model_name=name if results else None,
        eval_results=results or None,
        pipeline_tag="text-generation",
        tags=_tags(folder, job),
    )
    text = "\n\n".join(_parts(folder, job, name, names, figures, note))
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")
    with storage_errors("The model card cannot be written", str(folder)):
        write_atomic(folder / FILE_NAME, hide_environment(str(card)))


def _parts(
    folder: Path, job: JobConfig, name: str, names: list[str], figures: dict[str, Any], note: str
) -> Iterator[str]:
    base = _hub_base(job) or Path(job.model.model_name_or_path).name
    start = (
        "trained from scratch with the architecture of"
        if job.model.train_from_scratch
        else ("a fine-tuned" if names else "made from")
    )
    data = f" on {', '.join(names)}" if names else ""
    what = f"{start} {base}{data}."
    yield f"# {name}\n\n{what[0].upper()}{what[1:]} Stored as {_form(folder)}."
    if note:
        yield note
    yield f"## How to load\n\n{_loading(folder, job, base)}"
    if figures:
        rows = [f"| {key} | {_shown(value)} |" for key, value in figures.items()]
        yield "\n".join(["## Figures\n", "| | |", "|---|--:|", *rows])
    keys = yaml.safe_dump(_keys(job), sort_keys=False, allow_unicode=True).rstrip()
    title = "## Training\n\nThe keys of the job that differ from their defaults:"
    yield f"{title}\n\n```yaml\n{keys}\n```"
    yield f"Written by raytrain_adv {__version__}."


def _figures(folder: Path, job: JobConfig, report: RunReport) -> Iterator[tuple[str, Any]]:
    """Yield the run's figures that are true of this folder's weights."""
    yield from {"steps": report.steps, "epochs": report.epochs}.items()
    if report.train_loss:
        yield "training loss, last step logged", report.train_loss[-1][1]
    is_converted = report.converted[1] is not None and Path(report.converted[1]) == folder
    loss = report.converted_loss if is_converted else None
    if report.eval_loss and report.converted[1] is None:
        # Of a run that converts its model, the held-out loss is the converted one's.
        losses = [v for step, v in report.eval_loss if report.best_step in (None, step)]
        loss = losses[-1] if losses else None
    if loss is not None:
        yield "held-out loss", loss
        yield "held-out perplexity", perplexity(loss)
    if is_converted and report.comparison:
        yield "difference from training", report.comparison
    if report.device is not None:
        yield "trained on", f"{report.world_size} x {report.device}"


def _shown(value: Any) -> str:
    return (
        f"{value:,.4f}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )


def _tags(folder: Path, job: JobConfig) -> list[str]:
    tags = ["raytrain-adv", "fine-tuned" if job.train.stage == "sft" else "pretrained"]
    features: list[Any] = [one for one in job.transforms if one.enabled and one.feature]
    tags += [one.name for one in features if one.stage != "loss"]  # which is on by default
    form = _config(folder)
    tags += [one for one in stored_as(form) if one]
    tags += ["gguf"] if (folder / "model.gguf").is_file() else []
    return list(dict.fromkeys(tags))


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def _form(folder: Path) -> str:
    """Return how the weights are stored, in words."""
    if (folder / "model.gguf").is_file():
        return "GGUF, for llama.cpp"
    if _is_adapter(folder):
        return "an adapter in PEFT's format"
    config = _config(folder)
    form = " ".join(filter(None, stored_as(config)))
    form = f"{form} tensors" if form else str(config.get("dtype") or "float32")
    return form + (", with an adapter" if (folder / "adapter_config.json").is_file() else "")


def _loading(folder: Path, job: JobConfig, base: str) -> str:
    """Return commands that load the folder, as its format allows."""
    here = job.hub.hub_model_id or folder.name
    if (folder / "model.gguf").is_file():
        return f"```\nllama-server -m {here}/model.gguf\n```"
    method, stored = stored_as(_config(folder))
    has_adapter = (folder / "adapter_config.json").is_file()
    packages = ["torch", "transformers"]
    packages += [method] if method else []
    packages += ["peft"] if has_adapter else []
    code = how = ", trust_remote_code=True" if job.model.trust_remote_code else ""
    names = "AutoModelForCausalLM, AutoTokenizer"
    if has_adapter and method == ENGINES and stored != INTEGERS:
        how += f", {UNPACKING}"
        names += ", CompressedTensorsConfig"
    imports = f"from transformers import {names}\n\n"
    model = f'model = AutoModelForCausalLM.from_pretrained("{here}", dtype="auto"{how})\n'
    if _is_adapter(folder):
        imports = f"from peft import PeftModel\n{imports}"
        model = (
            f'base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto"{code})\n'
            f'model = PeftModel.from_pretrained(base, "{here}")\n'
        )
    text = (
        f"`{here}` is this folder, or its name on the Hub. `pip install {' '.join(packages)}`\n\n"
        f"```python\n{imports}"
        f'tokenizer = AutoTokenizer.from_pretrained("{here}"{code})\n'
        f"{model}"
        'messages = [{"role": "user", "content": "Hello"}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))\n```"
    )
    if _is_adapter(folder):
        served = f"vllm serve {base} --enable-lora --lora-modules {job.run_name}={here}"
    elif method == ENGINES and has_adapter:
        served = f"vllm serve {here} --enable-lora --lora-modules {job.run_name}={here}"
    elif method in ("", ENGINES) and not has_adapter:
        served = f"vllm serve {here}"
    else:
        return text
    return f"{text}\n\nWith vLLM:\n\n```\n{served}\n```"


def _hub_base(job: JobConfig) -> str | None:
    """Return the base model's name on the Hub; none for a folder, whose name there is not known."""
    name = job.model.model_name_or_path
    return name if _is_on_hub(name) else None


def _is_on_hub(name: str) -> bool:
    return "/" in name and looks_like_hub_name(name) and not Path(name).exists()


def _dataset_names(job: JobConfig) -> list[str]:
    """Return the datasets; of files their names alone, without the folders of a machine."""
    plain = [name for name in split_names(job.data.dataset) if name != "none"]
    return [name if _is_on_hub(name) else Path(name).name for name in plain]


def _license(job: JobConfig) -> str | None:
    """Return the license that the base model's card names; none if it is not known."""
    file = Path(job.model.model_name_or_path).expanduser() / FILE_NAME
    if not file.is_file():
        return None
    from huggingface_hub import ModelCard

    try:
        known = ModelCard.load(file, ignore_metadata_errors=True).data.license
    except (ValueError, OSError):
        return None
    return known if isinstance(known, str) else None


def _keys(job: JobConfig) -> dict[str, Any]:
    """Return keys that differ from their defaults, without those of machines, paths as names."""
    changed = {key for one in job.sections() for key in one.model_fields_set if one.is_changed(key)}
    return {
        key: _without_folders(value)
        for key, value in redact(job.given()).items()
        if key in changed and not key.startswith(OF_MACHINES)
    }


def _without_folders(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_folders(one) for one in value]
    if isinstance(value, str) and ("," not in value) and Path(value).is_absolute():
        return Path(value).name
    return ",".join(map(_without_folders, value.split(","))) if _has_folders(value) else value


def _has_folders(value: Any) -> bool:
    return isinstance(value, str) and any(Path(one).is_absolute() for one in value.split(",")[1:])
