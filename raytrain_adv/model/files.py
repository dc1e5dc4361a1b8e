"""The files of a local model, checked without loading them, and without torch."""

import importlib.util
from difflib import get_close_matches
from pathlib import Path

from raytrain_adv import hub
from raytrain_adv.config.job import JobConfig
from raytrain_adv.errors import JobError

# Without the package transformers would silently fetch a kernel from the Hub instead.
FLASH_PACKAGES = {
    "fa2": ("flash-attn", "flash_attn.flash_attn_interface"),
    "fa3": ("flash-attn-3", "flash_attn_interface"),
    "fa4": ("flash-attn-4", "flash_attn.cute"),
}
"""Distribution and module of each flash attention; two of them share a folder."""
WITH_WEIGHTS = "point model_name_or_path at a folder with weights, or set train_from_scratch: true"


def is_local(job: JobConfig) -> bool:
    """Return whether model_name_or_path is a folder; otherwise it is a name on the Hub."""
    return Path(job.model.model_name_or_path).expanduser().is_dir()


def model_source(job: JobConfig) -> str:
    """Return the model's folder as a path that needs no shell, or its name on the Hub as it is."""
    name = job.model.model_name_or_path
    return str(Path(name).expanduser()) if is_local(job) else name


def check_folder(job: JobConfig) -> None:
    """Refuse a path that is not a model folder, naming the nearest one that is."""
    name = job.model.model_name_or_path
    path = Path(name).expanduser()
    if path.is_dir():
        refuse_pipes(name, path)
        if not (path / "config.json").is_file():
            held = sorted(p.name for p in path.iterdir())
            raise JobError(
                f"{name} is not a model folder",
                f"no config.json in it; it holds {', '.join(held[:8]) or 'nothing'}",
                "point model_name_or_path at the folder that holds config.json",
            )
    elif path.is_file():
        raise JobError(
            f"model_name_or_path is a file: {name}",
            "a folder with config.json and safetensors files is needed",
            f"give its folder: {path.parent}",
        )
    elif not looks_like_hub_name(name):
        raise JobError(
            f"there is no model folder {name}",
            nearest_folders(path),
            f"correct model_name_or_path in {job.source}",
        )


def require_reachable(job: JobConfig) -> None:
    """Refuse a model of the Hub that is neither cached nor can be fetched, before its files are
    asked for: the Hub's client tries each for 23 s. Refuse a name that is none, too.
    """
    check_folder(job)
    if not is_local(job):
        name, near = job.model.model_name_or_path, Path(job.model.model_name_or_path).expanduser()
        revision, cache_dir = job.model.model_revision, job.model.cache_dir
        hub.require_model(name, revision, cache_dir, nearest_folders(near))


def refuse_pipes(name: str, folder: Path) -> None:
    """Refuse a folder in which a pipe or a device stands for a file: a reader would wait for it."""
    odd = [p for p in folder.iterdir() if p.exists() and not (p.is_file() or p.is_dir())]
    if odd:
        raise JobError(f"{name} is not a model folder", f"{odd[0]} is not a file", "put one there")


def looks_like_hub_name(name: str) -> bool:
    """Whether a name could be on the Hub: `owner/model` or `model`, by the rules of its client."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def nearest_folders(path: Path) -> str:
    """Name the folders next to a missing one, the most similar first, and where the model could be
    meant, as in models/gemma for a missing gemma.
    """
    elsewhere = sorted(str(p.parent) for p in Path().glob(f"*/{path.name}/config.json"))
    if elsewhere:
        return f"there is {', '.join(elsewhere[:3])}"
    while not path.parent.is_dir() and path != path.parent:
        path = path.parent
    parent = path.parent
    folders = sorted(p.name for p in parent.iterdir() if p.is_dir()) if parent.is_dir() else []
    close = get_close_matches(path.name, folders, n=3, cutoff=0.5)
    return f"{parent} has {', '.join(close or folders[:5]) or 'no folders'}"


def check_weights(job: JobConfig) -> None:
    """Refuse a model folder without safetensors weights; Hub models are checked when fetched."""
    if not is_local(job):
        return
    folder = Path(job.model.model_name_or_path).expanduser()
    if any(folder.glob("*.safetensors")):
        return
    old = sorted(p.name for p in folder.glob("pytorch_model*.bin"))
    if old:
        raise JobError(
            f"{folder} holds its weights as pickled files, which are not read",
            f"{', '.join(old[:3])} and no *.safetensors",
            "convert it once:\n"
            'python -c "import sys; from transformers import AutoModelForCausalLM as M; '
            "M.from_pretrained(sys.argv[1], dtype='auto').save_pretrained(sys.argv[2])\" "
            f"{folder} NEW_FOLDER\n"
            "then copy the tokenizer files over",
        )
    raise JobError(
        f"{folder} holds no weights",
        "config.json but no *.safetensors",
        WITH_WEIGHTS,
    )


def check_flash_package(asked: str) -> None:
    """Raise a JobError if flash_attn names a flash attention whose package is not here."""
    if asked in FLASH_PACKAGES and not has_package(asked):
        raise JobError(
            f"flash_attn: {asked} needs the package {FLASH_PACKAGES[asked][0]}",
            f"there is no module {FLASH_PACKAGES[asked][1]} here",
            "install it on the driver and the workers, or set flash_attn: auto",
        )


def has_package(name: str) -> bool:
    """Whether the package of a flash attention is installed; it is not imported."""
    parent, _, module = FLASH_PACKAGES[name][1].partition(".")
    found = importlib.util.find_spec(parent)
    if found is None or not module:
        return found is not None
    folders = [Path(place) for place in found.submodule_search_locations or ()]
    return any((each / module).is_dir() or (each / f"{module}.py").is_file() for each in folders)
