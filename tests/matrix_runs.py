"""Short runs of a tiny model with any features on, for the cells of the compatibility matrix."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from raytrain_adv.config import compatibility
from tests.conftest import TINY_LLAMA, write_rows
from tests.workers import run_workers

TOGETHER = {frozenset({"fp8", "tiled_mlp"}): {"fp8_recipe": "rowwise_with_gw_hp"}}
"""Features -> keys that they need beside their own."""
FEATURES = {feature.slug: feature for feature in compatibility.features()}
UNSHARDED = {"fsdp_shard_size": 1}
SAVED_AT, STEPS = 2, 3

Numbers = dict[int, tuple[float, float]]
"""Step -> loss and gradient norm, as logged."""


@dataclass
class Runs:
    """Runs on the same ranks, each done once."""

    folder: Path
    workers: int
    changed: dict[str, Any]
    """Keys of every job."""
    instead: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Feature -> keys in the place of those that it is tried with."""
    shape: dict[str, int] = field(default_factory=dict)
    """Keys of the model's config that differ."""
    exact: frozenset[str] = frozenset({"tiled_mlp"})
    """Features that compute the same numbers in another way."""
    done: dict[str, Path] = field(default_factory=dict)
    changed_modules: dict[Path, dict[str, int]] = field(default_factory=dict)
    """Folder of a run -> modules that each of its transforms changed."""

    def base(self) -> dict[str, Any]:
        """Return the keys of a job without features, on weights that were trained a little."""
        source = self.folder / "base"
        keys = {
            "model_name_or_path": str(source / "model"),
            "finetuning_type": "full",
            "dataset": str(self.folder / "rows.json"),
            "tokenized_path": str(self.folder / "tokenized"),
            "cutoff_len": 64,
            "per_device_train_batch_size": 2,
            "learning_rate": 1.0e-3,
            "max_steps": STEPS,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_gradient_checkpointing": True,
            "num_sample_answers": 0,
            "loss_kernel": "torch",  # chunked is the default, and one of the features
            "ray_num_workers": self.workers,
            **self.changed,
        }
        if not source.is_dir():
            write_rows(self.folder / "rows.json")
            shape = write_shape(self.folder / "shape", self.shape)
            scratch = {"model_name_or_path": str(shape), "train_from_scratch": True}
            self.run("base", {**keys, **scratch, "learning_rate": 1.0e-2})
        return keys

    def run(self, name: str, keys: dict[str, Any]) -> dict[str, Any]:
        """Run a job in a folder of its name; return rank 0's figures."""
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**keys, "output_dir": str(self.folder / name)}))
        (figures,) = run_workers(self.workers, path)
        self.changed_modules[self.folder / name] = figures["changed"]
        return figures

    def keys_of(self, slugs: tuple[str, ...]) -> dict[str, Any]:
        """Return what turns these features on, in a job of its own."""
        chosen = [self.instead.get(slug, FEATURES[slug].keys) for slug in slugs if slug != "fsdp"]
        chosen += [keys for pair, keys in TOGETHER.items() if pair <= {*slugs}]
        return {key: value for keys in chosen for key, value in keys.items()}

    def is_part(self, slug: str, slugs: tuple[str, ...]) -> bool:
        """Whether one of several features is on without being asked for, as the others need it."""
        rest = tuple(one for one in slugs if one != slug)
        return self.keys_of(rest) == self.keys_of(slugs)

    def require_on(self, slug: str, folder: Path, without: Path) -> None:
        """Require that a feature is on in a run, by the numbers of one without it, or by what it
        changed where it changes no number.
        """
        if slug in self.exact:
            assert self.changed_modules[folder][slug], f"{slug} is off"
        else:
            assert numbers(folder) != numbers(without), f"{slug} is off"

    def with_features(self, *slugs: str, **changed: Any) -> Path:
        """Return the folder of a run with these features."""
        name = name_of(slugs, changed)
        if name not in self.done:
            keys = {**self.base(), **self.keys_of(slugs), **changed}
            keys |= {"ray_num_workers": self.workers}
            self.run(name, keys)
            self.done[name] = self.folder / name
        return self.done[name]

    def resumed(self, *slugs: str, **changed: Any) -> tuple[Numbers, Numbers]:
        """Return the numbers of a run that saved, and of its last step done again after a kill."""
        name = "saved-" + name_of(slugs, changed)
        saved = {"save_strategy": "steps", "save_steps": SAVED_AT}
        keys = {**self.base(), **self.keys_of(slugs), **changed, **saved}
        keys |= {"ray_num_workers": self.workers}
        self.run(name, {**keys, "export_model": False})  # the resumed run exports
        whole = numbers(self.folder / name)
        (self.folder / name / "checkpoints/local" / f"step_{STEPS:08d}" / "manifest.json").unlink()
        figures = self.run(name, {**keys, "resume_from_checkpoint": True})
        assert figures["resumed_from_step"] == SAVED_AT
        self.done[name_of(slugs, changed)] = self.folder / name
        return whole, numbers(self.folder / name)


def name_of(slugs: tuple[str, ...], changed: dict[str, Any]) -> str:
    """Return the name of a run by its features and the keys that differ beside them."""
    return "+".join([*slugs, *sorted(changed)]) or "plain"


def write_shape(folder: Path, changed: dict[str, int]) -> Path:
    """Write the shape of a tiny Llama, and its tokenizer."""
    folder.mkdir()
    for file in TINY_LLAMA.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, **changed}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def numbers(folder: Path) -> Numbers:
    """Return what a run has logged of each step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in rows if r["kind"] == "train"}


def losses_of(folder: Path) -> list[float]:
    """Return a run's losses."""
    return [loss for loss, _ in numbers(folder).values()]


def require_loads(folder: Path) -> None:
    """Load what a run has exported, as its user would."""
    model = folder / "model"
    if (model / "adapter_config.json").is_file():
        base = json.loads((model / "adapter_config.json").read_text())["base_model_name_or_path"]
        plain: Any = AutoModelForCausalLM.from_pretrained(base)
        weights = load_file(model / "adapter_model.safetensors")
        rows = [t.shape[0] for name, t in weights.items() if name.endswith("embed_tokens.weight")]
        if rows:  # new tokens
            plain.resize_token_embeddings(rows[0])
        loaded: Any = PeftModel.from_pretrained(plain, model)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(model)
    assert loaded.num_parameters() > 1000
    if (folder / "model-quantized").is_dir():
        quantized = AutoModelForCausalLM.from_pretrained(folder / "model-quantized")
        assert "torchao" in str(quantized.config.quantization_config)
