"""Every feature on a tiny checkpoint of every causal language model of transformers, and on text of
every multimodal one.

    python -m tests.family_runs [--kinds llama,mamba2] [--features full,LoRA] [--again] [--out FILE]

Results are added to docs/families.json, family by family; docs/generate.py makes the page of them.
Each cell is `right`, or why it is not: `refused` by an error of this package that names the reason,
`wrong` if numbers differ from those of transformers or PEFT, `traceback` for any other exception,
`apart` if the model's own forward pass takes no text alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
import yaml
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy, pad
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from raytrain_adv.config import load
from raytrain_adv.data.prepare import prepare
from raytrain_adv.driver.commands.export import prepared_model
from raytrain_adv.errors import RaytrainAdvError
from raytrain_adv.export.model_folder import export_model
from raytrain_adv.model.weights import load_pretrained, packed_weights
from raytrain_adv.ops.loss import IGNORE
from raytrain_adv.run.run import local_run
from raytrain_adv.text import first_line
from raytrain_adv.worker.train import train
from tests.families import families, tiny_model
from tests.multimodal_families import has_text as is_multimodal
from tests.multimodal_families import multimodal_families, tiny_multimodal
from tests.ports import held_port

RESULTS = Path(__file__).parent.parent / "docs" / "families.json"
SECONDS = 600.0  # for all of a family
QAT = {"enable_qat": True, "qat_activation_dtype": "none"}
KEYS: dict[str, dict[str, Any]] = {
    "full": {},
    "export": {},
    "bf16": {"bf16": True},
    "LoRA": {"finetuning_type": "lora"},
    "QLoRA": {"finetuning_type": "lora", "quantization_bit": 4},
    "FP8": {"fp8": True, "fp8_allow_cpu": True, "fp8_min_features": 16},
    "QAT int8": {**QAT, "qat_weight_dtype": "int8", "qat_group_size": None},
    "QAT int4": {**QAT, "qat_weight_dtype": "int4", "qat_group_size": None},
    "packing": {"neat_packing": True, "per_device_train_batch_size": 1},
    "chunked loss": {"loss_kernel": "chunked"},
    "checkpointing": {"disable_gradient_checkpointing": False, "gradient_checkpointing": "full"},
    "selective": {"disable_gradient_checkpointing": False, "gradient_checkpointing": "selective"},
    "resume": {"save_strategy": "steps", "save_steps": 1},
}
"""Feature -> the keys that turn it on."""
MORE = re.compile(r"pixel_values|input_features|mm_token_type_ids")
"""Inputs of a forward pass that tell of images and sounds."""
WANT_KINDS = ("molmo2",)
"""Model types that are trained with the kind of each token alone."""
EXACT, ROUNDED, COARSE = 2e-4, 0.02, 0.1
"""Allowed differences of losses, relative: in another order, in bf16, in 4 or 8 bits."""


def all_families() -> list[str]:
    """Return the model types of text models, then those of multimodal ones."""
    return [*families(), *multimodal_families()]


class Apart(Exception):
    """A model cannot be trained on text alone: its own forward pass in transformers refuses it."""


class Differs(Exception):
    """A number is not that of plain transformers or PEFT."""


def compare(what: str, found: float, wanted: float, most: float) -> None:
    """Refuse a number that is further from the wanted one than `most`, relative."""
    if not abs(found - wanted) <= most * max(abs(wanted), 1e-6):
        raise Differs(f"{what} {found:.6g}, wanted {wanted:.6g}")


@dataclass
class Family:
    """The tiny checkpoint of a family, and what plain transformers computes with it."""

    keys: ClassVar[dict[str, dict[str, Any]]] = KEYS
    kind: str
    folder: Path
    loss: float = 0.0
    norm: float = 0.0
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    model_class: Any = AutoModelForCausalLM
    """What a user loads it with."""

    @property
    def checkpoint(self) -> Path:
        """Where the checkpoint is."""
        return self.folder / "checkpoint"

    def write(self) -> None:
        """Write checkpoint, tokenizer and rows, and compute loss and gradient norm."""
        if is_multimodal(self.kind):
            model = tiny_multimodal(self.kind)
            self.model_class = type(model)
        else:
            model = tiny_model(self.kind)
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            for name, value in config.to_dict().items():
                if isinstance(value, float) and "drop" in name:
                    setattr(config, name, 0.0)  # two runs drop different numbers
        model.save_pretrained(self.checkpoint)
        write_tokenizer(self.checkpoint)
        rows = [
            {"instruction": f"Add {n}.", "input": "", "output": f"{n} {n + n}" * (n % 3 + 1)}
            for n in range(4)
        ]
        (self.folder / "rows.json").write_text(json.dumps(rows))
        self.batch = read_batch(self.job("plain"))
        plain = self.model_class.from_pretrained(self.checkpoint, dtype=torch.float32).train()
        try:
            loss = loss_of(plain, self.batch)
        except (TypeError, ValueError) as error:
            if MORE.search(str(error)):
                raise Apart(first_line(str(error))) from error
            raise
        loss.backward()
        norms = [p.grad for p in plain.parameters() if p.grad is not None]
        self.loss, self.norm = loss.item(), float(torch.nn.utils.get_total_norm(norms))

    def job(self, name: str, **keys: Any) -> Path:
        """Write a job, and return its path."""
        values = {
            "model_name_or_path": str(self.checkpoint),
            "finetuning_type": "full",
            "dataset": str(self.folder / "rows.json"),
            "eval_dataset": str(self.folder / "rows.json"),
            "template": "default",
            "cutoff_len": 192,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "max_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_gradient_checkpointing": True,
            "loss_kernel": "torch",
            "num_sample_answers": 0,
            "preprocessing_num_workers": 1,
            "use_cpu": True,
            "tokenized_path": str(self.folder / "tokenized"),
            "output_dir": str(self.folder / name.replace(" ", "_")),
            **keys,
        }
        path = self.folder / f"{name.replace(' ', '_')}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    def run(self, feature: str, **keys: Any) -> Run:
        """Train with a feature, once; return what was found."""
        path = self.job("full" if feature == "export" else feature, **self.keys[feature], **keys)
        out = Path(yaml.safe_load(path.read_text())["output_dir"])
        if not (out / "model").is_dir() or keys:
            job = load(path)
            run = local_run(job)
            train(job, run, export_model)
            run.close()
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        steps = [(r["loss"], r["grad_norm"]) for r in rows if r["kind"] == "train"]
        last = [r["loss"] for r in rows if r["kind"] == "eval"][-1]
        return Run(out / "model", steps, last)


@dataclass
class Run:
    """What a run logged and left."""

    model: Path
    steps: list[tuple[float, float]]
    """Loss and gradient norm of each step."""
    held_out: float
    """Loss of the trained model on the rows."""


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(folder)


def read_batch(job: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, mask and shifted labels of all rows, [rows, tokens] each."""
    rows = list(prepare(load(job), lambda sentence: None).train)
    longest = max(len(row.input_ids) for row in rows)

    def together(name: str, filler: int) -> torch.Tensor:
        held = [torch.from_numpy(getattr(row, name)).long() for row in rows]
        return torch.stack([pad(one, (0, longest - len(one)), value=filler) for one in held])

    ids, labels = together("input_ids", 0), together("labels", IGNORE)
    lengths = torch.tensor([len(row.input_ids) for row in rows])
    return ids, (torch.arange(longest) < lengths[:, None]).long(), labels


def loss_of(model: Any, batch: Any) -> torch.Tensor:
    """Return the mean loss of the labels."""
    ids, mask, labels = batch
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if model.training and model.config.model_type in WANT_KINDS:
        given["mm_token_type_ids"] = torch.zeros_like(ids)
    logits = model(**given).logits
    if logits.shape[:2] != ids.shape:
        raise Apart("its logits are of other tokens than those given: it is no next-token model")
    return cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


def dequantize(model: Any, job: Path) -> None:
    """Give a plain model the values that a job's quantized base stands for."""
    ours, _ = prepared_model(load(job))
    load_pretrained(ours, load(job), torch.device("cpu"))
    with torch.no_grad():
        for name, layer in packed_weights(ours).items():
            model.get_parameter(name).copy_(layer.unpacked())


def reloaded(family: Family, run: Run, adapted: bool, quantized: str = "") -> float:
    """Return the loss of what a run exported, loaded as its user does; an adapter of a feature that
    quantizes the base on the base's values.
    """
    path, load_it = family.checkpoint if adapted else run.model, family.model_class.from_pretrained
    model, info = load_it(path, dtype=torch.float32, output_loading_info=True)
    if wrong := {kind: sorted(map(str, names))[:3] for kind, names in info.items() if names}:
        raise Differs(f"loading: {wrong}")
    if quantized:
        dequantize(model, family.job(quantized, **family.keys[quantized]))
    if adapted:
        model = PeftModel.from_pretrained(model, run.model)
    with torch.no_grad():
        return float(loss_of(model.eval(), family.batch))


def check(family: Family, feature: str) -> None:
    """Run a feature and compare its numbers.

    Raises:
        Differs: if they are not those of plain transformers or PEFT.
    """
    if feature == "resume":
        check_resumed(family)
        return
    run = family.run(feature)
    first, norm = run.steps[0]
    allowed = {
        "bf16": ROUNDED,
        "QLoRA": COARSE,
        "FP8 base": ROUNDED,
        "FP8": COARSE,
        "QAT int8": COARSE,
        "QAT int4": 1.0,
    }
    compare("loss", first, family.loss, allowed.get(feature, EXACT))
    if feature in ("full", "packing", "chunked loss", "checkpointing", "selective"):
        compare("gradient norm", norm, family.norm, 10 * EXACT)
    if feature in ("export", "LoRA"):
        loss = reloaded(family, run, feature == "LoRA")
        compare("loss of the exported model", loss, run.held_out, EXACT)
    if feature == "QLoRA":
        compare("loss in PEFT", reloaded(family, run, True, feature), run.held_out, EXACT)


def check_resumed(family: Family) -> None:
    """Compare a run's last step with the same step after a resume."""
    whole = family.run("resume")
    last = family.folder / "resume/checkpoints/local/step_00000002/manifest.json"
    last.unlink()
    again = family.run("resume", resume_from_checkpoint=True)
    if again.steps != whole.steps:
        raise Differs(f"losses and norms {again.steps}, wanted {whole.steps}")


FOLDER = re.compile(r"/\S*/files/")
"""Where a family's runs are, which differs from run to run."""


def result(action: Callable[[], None]) -> str:
    """Return `right`, or what came instead."""
    try:
        action()
    except Apart as error:
        return f"apart: {error}"[:300]
    except Differs as error:
        return f"wrong: {error}"
    except RaytrainAdvError as error:
        text = f"refused: {error.what}; {first_line(str(error.found))}"
        return FOLDER.sub("", text)[:300]
    except Exception as error:  # whatever a family's own code raises is the result
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        return f"traceback: {type(error).__name__}: {first_line(str(error))} ({where})"[:300]
    return "right"


def try_family(kind: str, features: tuple[str, ...], folder: Path) -> dict[str, str]:
    """Return the result of each feature on a family, in this process."""
    folder.mkdir(parents=True, exist_ok=True)
    family = Family(kind, folder)
    made = result(family.write)
    if made.startswith("apart"):
        return dict.fromkeys(features, made)
    if made != "right":
        return dict.fromkeys(features, f"not tried: {made}")
    return {feature: result(partial(check, family, feature)) for feature in features}


def _apart(kind: str, features: tuple[str, ...], answer: Path) -> None:
    torch.set_num_threads(1)
    with held_port() as port:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": str(port)}
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        answer.write_text(json.dumps(try_family(kind, features, answer.parent / "files")))


def apart(kind: str, features: tuple[str, ...] = tuple(KEYS)) -> dict[str, str]:
    """Return the result of each feature on a family, from a process of its own."""
    with tempfile.TemporaryDirectory(prefix=f"family_{kind}_") as folder:
        answer = Path(folder) / "answer.json"
        context = multiprocessing.get_context("fork")
        process = context.Process(target=_apart, args=(kind, features, answer))
        process.start()
        process.join(SECONDS)
        process.kill()
        process.join()
        if answer.is_file():
            found: dict[str, str] = json.loads(answer.read_text())
            return found
    return dict.fromkeys(features, f"traceback: the process ended, exit code {process.exitcode}")


def main() -> None:
    """Try families, and add the results to the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = all_families()
    parser.add_argument("--kinds", default=",".join(every))
    parser.add_argument("--features", default=",".join(KEYS))
    parser.add_argument("--again", action="store_true", help="also what the file has already")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    stored = json.loads(given.out.read_text()) if given.out.is_file() else {"families": {}}
    held = {kind: {} for kind in every} | stored["families"]
    for kind in given.kinds.split(","):
        wanted = tuple(given.features.split(","))
        due = tuple(f for f in wanted if given.again or f not in held.get(kind, {}))
        if not due:
            continue
        found = apart(kind, due)
        held[kind] = {**held.get(kind, {}), **found}
        stored = {"transformers": transformers.__version__, "families": dict(sorted(held.items()))}
        given.out.write_text(json.dumps(stored, indent=1) + "\n")
        odd = {feature: text for feature, text in found.items() if text != "right"}
        print(f"{kind}: {len(found) - len(odd)} of {len(found)} right {odd or ''}", flush=True)


if __name__ == "__main__":
    main()
