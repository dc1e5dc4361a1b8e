"""Load a finished model and its tokenizer, as its run trained them, onto one device."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.tokens.templates import find_template
from raytrain_adv.data.tokens.tokenizer import adopt
from raytrain_adv.driver.commands.export import CPU, job_of, prepared_model
from raytrain_adv.driver.commands.use.source import Source
from raytrain_adv.dtensor import plain_name
from raytrain_adv.errors import JobError
from raytrain_adv.export.folder import folder_gib
from raytrain_adv.export.verify import load_folder, read_folder
from raytrain_adv.model import weights
from raytrain_adv.model.adapter import load_adapter, require_same_base
from raytrain_adv.model.build import keeps_float32
from raytrain_adv.model.parallel import compute_dtype
from raytrain_adv.text import disk, first_line
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.lora import Lora


@dataclass(frozen=True)
class Loaded:
    """A model that answers."""

    source: Source
    model: Any
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    system: str
    """The system message of conversations without one, as in training; empty for the template's."""
    thinks: bool | None = None
    """enable_thinking of its run; none leaves it to the template."""

    @property
    def name(self) -> str:
        """The folder, short enough for a heading."""
        return short(self.source.folder)

    @property
    def has_template(self) -> bool:
        """Whether it takes conversations; otherwise it continues text."""
        return self.tokenizer.chat_template is not None

    def words(self) -> str:
        """Return which weights were loaded, for the user."""
        size = disk(folder_gib(self.source.folder))
        how = "" if self.has_template else "; no chat template: text is continued as it is"
        return f"{self.source.folder} ({self.source.form}, {size}, on {self.device}{how})"


def short(folder: Path) -> str:
    """Return the end of a folder's path, for a heading."""
    return "/".join(folder.parts[-2:])


def job_from(source: Source) -> JobConfig | None:
    """Return the job of a model's run, without what only matters in training."""
    return job_of(source.run, source.keys, []) if source.run is not None and source.keys else None


def device_named(name: str) -> torch.device:
    """Return the device to compute on; auto takes a GPU if there is one. Raises JobError."""
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        fix = "leave --device out: the CPU is used"
        raise JobError("--device cuda: there is no GPU", "torch.cuda.is_available() is false", fix)
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


def load(source: Source, device: torch.device, template: str, runs_code: bool) -> Loaded:
    """Load a model. `template` replaces its chat template by one of the names of the job key.
    Raises JobError if its files cannot be read here, with what to do; TrainingError if they are not
    a whole model.
    """
    job = job_from(source)
    runs_code |= job is not None and job.model.trust_remote_code
    tokenizer = _tokenizer(source.folder, runs_code)
    if template:
        adopt(tokenizer, find_template(template), find_template(template).write(True, False))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    model = _model(source, job, runs_code)
    system = str(source.keys.get("default_system") or "")
    thinks = source.keys.get("enable_thinking")
    return Loaded(source, model.to(device).eval(), tokenizer, device, system, thinks)


def _tokenizer(folder: Path, runs_code: bool) -> PreTrainedTokenizerBase:
    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=runs_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        fix = "put the tokenizer's files (tokenizer.json, tokenizer_config.json) into the folder"
        raise JobError(f"{folder} has no tokenizer", first_line(error), fix) from error
    if not isinstance(found, PreTrainedTokenizerBase):
        raise JobError(f"{folder} has no text tokenizer", type(found).__name__, "name another one")
    return found


def _model(source: Source, job: JobConfig | None, runs_code: bool) -> Any:
    if source.kind == "gguf":
        return _of_gguf(source.folder)
    if source.kind == "adapter" and job is not None and not _belongs_to_another_model(job):
        return _adapted(job, source.folder)
    try:
        if source.run is not None and source.kind == "model":
            return load_folder(source.folder, runs_code, None)
        return _foreign(source, runs_code)
    except ImportError as error:
        fix = "install what it names; pip install 'raytrain-adv[serve]' reads engines' formats"
        raise JobError(f"{source.folder} needs a package", first_line(error), fix) from error
    except (OSError, ValueError) as error:
        fix = "name a folder that transformers can load"
        if "trust_remote_code" in str(error):
            fix = "read the code that is in it, then give --trust-remote-code"
        what = f"{source.folder} cannot be loaded ({source.form})"
        raise JobError(what, first_line(error), fix) from error


def _belongs_to_another_model(job: JobConfig) -> bool:
    """Whether a run's adapter is not for its model as it is adapted in training: its base has other
    adapters merged into it, or what PiSSA took out, or PiSSA's adapter has become another.
    """
    return job.transform(Lora).changes_base or job.transform(Lora).pissa_init


def _foreign(source: Source, runs_code: bool) -> Any:
    """Load a folder that no run here wrote, or an adapter without its run."""
    shape = source.base if source.kind == "adapter" else source.folder
    config = AutoConfig.from_pretrained(shape, trust_remote_code=runs_code)
    model, info = read_folder(Path(shape), config, runs_code, None)
    if source.kind == "adapter":
        model.load_adapter(source.folder)
    if missing := sorted(map(str, info["missing_keys"])):
        raise JobError(
            f"{source.folder} lacks weights, which would be random",
            f"{len(missing)} of them, as {missing[0]}",
            "name a folder with a whole model",
        )
    return model


def _adapted(job: JobConfig, folder: Path) -> Any:
    """Return the run's base, as it was held in training, with the adapter of the folder."""
    model, plans = prepared_model(job)
    weights.load_pretrained(model, job, CPU)
    Transforms(job).initialize(model, plans, job.train.seed)
    load_adapter(model, folder)
    require_same_base(folder, job)
    Transforms(job).switch(model, True)
    dtype, keeps = compute_dtype(job), keeps_float32(model)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not keeps(plain_name(name)):
            parameter.data = parameter.data.to(dtype)
    return model


def _of_gguf(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    try:
        # Of a mixture's GGUF transformers 5.23 reads no expert's size.
        keys = {"config": AutoConfig.from_pretrained(folder), "dtype": torch.float32}
        return auto.from_pretrained(folder, gguf_file="model.gguf", **keys)
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        fix = "pip install gguf; or serve it: llama-server -m " + str(folder / "model.gguf")
        raise JobError(f"{folder} cannot be loaded", first_line(error), fix) from error
