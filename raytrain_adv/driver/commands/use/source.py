"""What a user names to chat with or to evaluate: a run, or one model folder; without torch."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from raytrain_adv.config.job import transform_types
from raytrain_adv.driver.output import output_dir
from raytrain_adv.driver.output.replaced import RUN_FILE
from raytrain_adv.errors import JobError
from raytrain_adv.model.files import nearest_folders
from raytrain_adv.ops.fake_quant.targets import stored_as
from raytrain_adv.text import listed, plural
from raytrain_adv.transforms.targets import own_base
from raytrain_adv.transforms.transform import Switchable

Kind = Literal["model", "adapter", "gguf"]
HELD: dict[str, Kind] = {
    "model.gguf": "gguf",  # beside a config.json, which transformers would take for the model's
    "config.json": "model",  # with an adapter beside it, transformers loads both
    "adapter_config.json": "adapter",
}


@dataclass(frozen=True)
class Source:
    """A folder that holds a model, and the run it is of."""

    folder: Path
    kind: Kind
    run: Path | None
    """The output_dir of its run; none if it is not a run's, or was moved."""

    @cached_property
    def keys(self) -> dict[str, Any]:
        """The keys of its run's job; empty without one."""
        record = output_dir.record_of(self.run) if self.run is not None else None
        return dict(record["job"]) if record is not None else {}

    @cached_property
    def form(self) -> str:
        """What the weights are stored as, in words."""
        if self.kind == "gguf":
            return "GGUF"
        if self.kind == "adapter":
            kinds = [kind for kind in transform_types() if issubclass(kind, Switchable)]
            on = [k.evaluated_as for k in kinds if self.keys.get(next(iter(k.model_fields)))]
            return ", ".join([f"an adapter on {Path(self.base).name}", *on])
        config = json.loads((self.folder / "config.json").read_text())
        form = " ".join(filter(None, stored_as(config)))
        form = form or str(config.get("dtype") or config.get("torch_dtype") or "float32")
        return form + (" and an adapter" if (self.folder / "adapter_config.json").is_file() else "")

    @property
    def base(self) -> str:
        """The model that an adapter is for."""
        if (own := own_base(self.folder)) is not None:
            return str(own)
        config = json.loads((self.folder / "adapter_config.json").read_text())
        return str(config.get("base_model_name_or_path"))


def find(named: str) -> list[Source]:
    """Return the models of a run, the one to be served first, or the one of a model folder. Raises
    JobError if the folder is neither, or its run has written no model.
    """
    folder = Path(named).expanduser()
    if not folder.is_dir():
        fix = "name a run's output_dir, or a model folder"
        raise JobError(f"there is no folder {named}", nearest_folders(folder), fix)
    if (kind := _kind(folder)) is not None:
        return [Source(folder, kind, _run_of(folder))]
    if (folder / output_dir.SWEEP_FILE).is_file():
        trials = sorted(str(path.parent) for path in folder.glob(f"trials/*/{RUN_FILE}"))
        fix = f"name a trial's folder: {listed(trials, 4)}"
        raise JobError(f"{named} is a sweep", f"it has {plural(len(trials), 'run')}", fix)
    if not (folder / RUN_FILE).is_file():
        held = listed(sorted(p.name for p in folder.iterdir()), 8) or "nothing"
        runs = listed(list(map(str, output_dir.runs_in(folder))), 4)
        fix = f"name a folder with {RUN_FILE} (a run), or with config.json and safetensors"
        fix = f"name one of the runs in it: {runs}" if runs else fix
        raise JobError(f"{named} is neither a run nor a model folder", f"it holds {held}", fix)
    held_there = [(folder / name, _kind(folder / name)) for name in reversed(output_dir.MODELS)]
    found = [Source(path, kind, folder) for path, kind in held_there if kind is not None]
    if not found:
        raise JobError(
            f"{named} is a run that has written no model",
            _state(folder),
            f"raytrain-adv export {named} writes one from its newest checkpoint",
        )
    return found


def _kind(folder: Path) -> Kind | None:
    return next((kind for name, kind in HELD.items() if (folder / name).is_file()), None)


def _run_of(folder: Path) -> Path | None:
    """Return the run that a model folder is in, at most two folders up (RUN/exported-step_9)."""
    above = list(folder.absolute().parents)[:2]
    return next((path for path in above if (path / RUN_FILE).is_file()), None)


def _state(folder: Path) -> str:
    record = output_dir.record_of(folder)
    if record is None:
        return f"its {RUN_FILE} cannot be read"
    if output_dir.is_held(folder):
        return "it is running"
    return f"its status is {record['status']}"
