"""What is fuzzed: for each kind of file how a mutated one is made, and what reads it."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from raytrain_adv import cli
from raytrain_adv.config import load
from raytrain_adv.data.prepare import prepare
from raytrain_adv.data.tokens import limits
from raytrain_adv.data.tokens.tokenizer import load_tokenizer
from raytrain_adv.model import weights
from raytrain_adv.model.build import build
from tests.conftest import ROOT, tiny_keys, write_rows
from tests.fuzz.mutate import dumped, mutate_bytes, mutate_file, mutate_json, nasty
from tests.kernel_folders import LAYERS

CPU = torch.device("cpu")
Once = Callable[[Random, Path], None]
"""Makes one mutated file in a folder of its own, and has it read."""


def tiny_model(folder: Path) -> Path:
    """Write a model with weights and a tokenizer; return its folder."""
    keys = tiny_keys(folder)
    model = Path(keys["model_name_or_path"])
    config = LlamaConfig(**json.loads((model / "config.json").read_text()))
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    return model


def keys_of(folder: Path, model: Path, **changed: Any) -> dict[str, Any]:
    """Return keys of a job that reads this model."""
    rows = folder / "rows.json"
    if not rows.exists():
        write_rows(rows, 4)
    keys = {
        "model_name_or_path": str(model),
        "finetuning_type": "full",
        "dataset": str(rows),
        "cutoff_len": 64,
        "output_dir": str(folder / "out"),
        "tokenized_path": str(folder / "tokenized"),
        "preprocessing_num_workers": 1,
        "use_cpu": True,
    }
    return {**keys, **changed}


def loaded(folder: Path, **keys: Any) -> Any:
    """Load a job of these keys."""
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(keys))
    return load(path)


def planned(folder: Path, **keys: Any) -> None:
    """Plan a job as the command does; a traceback or a code without a message is an error."""
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(keys))
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(["plan", str(path)])
    text = said.getvalue()
    if "Traceback" in text or (code != 0 and "fix:" not in text):
        raise AssertionError(f"exit code {code}: {text[-1500:]}")


class Jobs:
    """Job files: those that are shipped, changed in text and in values."""

    def __init__(self, folder: Path) -> None:
        files = [*ROOT.glob("jobs/**/*.yaml"), *ROOT.glob("tests/**/*.yaml")]
        self.texts = [file.read_bytes() for file in sorted(files) if file.stat().st_size < 20_000]
        self.values = [v for t in self.texts if isinstance(v := _yaml(t), dict)]
        self.keys = sorted({key for value in self.values for key in value})

    def __call__(self, draw: Random, folder: Path) -> None:
        """Load one."""
        path = folder / "job.yaml"
        if draw.random() < 0.4:
            path.write_bytes(mutate_bytes(draw, draw.choice(self.texts)))
        else:
            value = mutate_json(draw, draw.choice(self.values))
            if isinstance(value, dict):
                value[draw.choice(self.keys)] = nasty(draw)
            path.write_bytes(dumped(value))
        load(path).fingerprint()


def _yaml(text: bytes) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CALLS = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}]
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]
ROWS: list[list[dict[str, Any]]] = [
    [{"instruction": "a", "input": "", "output": "b", "history": [["c", "d"]], "system": "e"}] * 3,
    [{"messages": CHAT}] * 3,
    [{"messages": [*CALLS, {"role": "tool", "content": "1"}, CHAT[1]], "tools": [TOOL]}] * 2,
    [{"conversations": SHARED, "system": "x", "tools": "[]"}] * 3,
    [{"text": "a b c"}] * 3,
    [{"prompt": "a", "completion": "b"}] * 3,
]


class Data:
    """Data files: rows of each layout, as each type of file."""

    def __init__(self, folder: Path) -> None:
        self.model = tiny_model(folder)

    def __call__(self, draw: Random, folder: Path) -> None:
        """Prepare one."""
        kind = draw.choice(["json", "jsonl", "csv", "txt", "parquet", "arrow"])
        rows = mutate_json(draw, draw.choice(ROWS)) if draw.random() < 0.8 else draw.choice(ROWS)
        file = folder / f"rows.{kind}"
        file.write_bytes(self.written(kind, rows))
        if draw.random() < 0.4:
            file.write_bytes(mutate_bytes(draw, file.read_bytes()))
        keys = keys_of(folder, self.model, dataset=str(file), packing=draw.random() < 0.3)
        if draw.random() < 0.2:
            keys |= {"dataset": "own", "dataset_dir": str(folder)}
            columns = {"prompt": "instruction", "messages": "messages"}
            info = {"own": {"file_name": file.name, "columns": columns, "formatting": "alpaca"}}
            (folder / "dataset_info.json").write_bytes(mutate_file(draw, dumped(info)))
        prepare(loaded(folder, **keys), lambda text: None)

    @staticmethod
    def written(kind: str, rows: Any) -> bytes:
        """Return rows as a file of a kind; as JSON what that cannot hold."""
        if kind == "jsonl":
            each = rows if isinstance(rows, list) else [rows]
            return b"\n".join(map(dumped, each))
        if kind in ("parquet", "arrow"):
            import pyarrow as pa
            import pyarrow.parquet as pq

            out = io.BytesIO()
            try:
                table = pa.Table.from_pylist(rows)
                if kind == "parquet":
                    pq.write_table(table, out)
                else:
                    with pa.ipc.new_stream(out, table.schema) as stream:
                        stream.write_table(table)
                return out.getvalue()
            except Exception:
                return dumped(rows)
        return dumped(rows)


class Folder:
    """A folder of which one file is mutated."""

    names: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        self.source = tiny_model(folder)

    def copy(self, draw: Random, folder: Path) -> Path:
        """Return a copy with one mutated file."""
        own = folder / "model"
        shutil.copytree(self.source, own)
        file = own / draw.choice(self.names)
        file.write_bytes(self.mutated(draw, file))
        return own

    def mutated(self, draw: Random, file: Path) -> bytes:
        """Return a file's mutated content."""
        return mutate_file(draw, file.read_bytes())


def mutate_tensors(draw: Random, data: bytes) -> bytes:
    """Mutate a safetensors file: its header, the header's length, its bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = draw.randrange(5)
    if kind == 0:
        return mutate_bytes(draw, data)
    if kind == 1:
        return struct.pack("<Q", draw.choice([0, 1, 2**31, 2**40, 2**64 - 1])) + data[8:]
    new = dumped(mutate_json(draw, header))
    return struct.pack("<Q", len(new)) + new + rest


# fmt: off
CONFIG_KEYS = (
    "text_config", "vision_config", "quantization_config", "rope_parameters", "rope_scaling",
    "auto_map", "layer_types", "dtype", "architectures", "tokenizer_class", "id2label",
    "attn_implementation", "head_dim", "sliding_window", "num_experts", "num_local_experts",
    "is_decoder", "attention_dropout", "tie_word_embeddings", "per_layer_config", "eos_token_id",
    "pad_token_id", "is_encoder_decoder",
)
# fmt: on
"""Keys that transformers reads of any config, also of one that lacks them."""


class Checkpoints(Folder):
    """Model folders: config.json, the index, headers and bytes of weights."""

    names = (
        "config.json",
        "model.safetensors.index.json",
        "a.safetensors",
        "generation_config.json",
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (self.source / "model.safetensors").rename(self.source / "a.safetensors")
        data = (self.source / "a.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        names = [n for n in json.loads(data[8 : 8 + length]) if n != "__metadata__"]
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "a.safetensors")}
        (self.source / "model.safetensors.index.json").write_bytes(dumped(index))

    def mutated(self, draw: Random, file: Path) -> bytes:
        """Return a file's mutated content."""
        if file.suffix == ".safetensors":
            return mutate_tensors(draw, file.read_bytes())
        if file.name == "config.json" and draw.random() < 0.5:
            config = json.loads(file.read_bytes())
            inner = mutate_json(draw, config)
            if isinstance(inner, dict):
                inner[draw.choice(CONFIG_KEYS)] = nasty(draw)
            value = draw.choice([nasty(draw), inner, {draw.choice(CONFIG_KEYS): inner}])
            return dumped({**config, draw.choice(CONFIG_KEYS): value})
        return super().mutated(draw, file)

    def __call__(self, draw: Random, folder: Path) -> None:
        """Build and load one."""
        job = loaded(folder, **keys_of(folder, self.copy(draw, folder)))
        model = build(job)
        weights.materialize(model, CPU, CPU)
        weights.load_pretrained(model, job, CPU)


class Plans(Checkpoints):
    """Model folders again, read by the whole of `raytrain-adv plan`."""

    def __call__(self, draw: Random, folder: Path) -> None:
        """Plan a job of one."""
        planned(folder, **keys_of(folder, self.copy(draw, folder)))


class Tokenizers(Folder):
    """Tokenizers: tokenizer.json and tokenizer_config.json."""

    names = ("tokenizer.json", "tokenizer_config.json")

    def __call__(self, draw: Random, folder: Path) -> None:
        """Tokenize rows with one."""
        job = loaded(folder, **keys_of(folder, self.copy(draw, folder)))
        load_tokenizer(job)
        prepare(job, lambda text: None)


PIECES = [
    "{% for m in messages %}",
    "{% endfor %}",
    "{{ m['content'] }}",
    "{{ m.role }}",
    "{{ messages[0] }}",
    "{% if add_generation_prompt %}A{% endif %}",
    "{% set x = x ~ x %}",
    "{{ raise_exception('\x1b[2J') }}",
    "{% generation %}",
    "{% endgeneration %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(messages[0]) }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 999999999 }}",
    "{{ range(10**9) | list }}",
    "{{ '%999999999d' | format(1) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ tools | tojson }}",
    "{{ 10 ** 10 ** 8 }}",
    "{% include 'x' %}",
    "{{ cycler.__init__.__globals__.os.system('touch RAN') }}",
    "{{ m | pprint }}",
    "{{ eos_token }}{{ bos_token }}",
]


class Templates(Folder):
    """Chat templates: pieces of Jinja put together, and the shipped one mutated."""

    names = ("chat_template.jinja",)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        config = json.loads((self.source / "tokenizer_config.json").read_text())
        (self.source / "chat_template.jinja").write_text(config.pop("chat_template"))
        (self.source / "tokenizer_config.json").write_text(json.dumps(config))

    def mutated(self, draw: Random, file: Path) -> bytes:
        """Return a file's mutated content."""
        if draw.random() < 0.4:
            return mutate_bytes(draw, file.read_bytes())
        pieces = draw.choices(PIECES, k=draw.randrange(1, 7))
        if draw.random() < 0.5:
            pieces = [PIECES[0], PIECES[3], ": ", PIECES[2], "\n", *pieces, PIECES[1]]
        return "".join(pieces).encode()

    def __call__(self, draw: Random, folder: Path) -> None:
        """Tokenize rows with one."""
        job = loaded(folder, **keys_of(folder, self.copy(draw, folder)))
        prepare(job, lambda text: None)


class Adapters:
    """Adapter folders: adapter_config.json and the tensors."""

    def __init__(self, folder: Path) -> None:
        from peft import LoraConfig, get_peft_model

        self.model = tiny_model(folder)
        base = AutoModelForCausalLM.from_pretrained(self.model)
        config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        get_peft_model(base, config).save_pretrained(folder / "adapter")
        self.source = folder / "adapter"

    def __call__(self, draw: Random, folder: Path) -> None:
        """Plan a job that goes on from one, and load it."""
        from raytrain_adv.model.adapter import load_adapter
        from raytrain_adv.transforms.applied import Transforms

        own = folder / "adapter"
        shutil.copytree(self.source, own)
        name = draw.choice(["adapter_config.json", "adapter_model.safetensors"])
        change = mutate_file if name.endswith("json") else mutate_tensors
        (own / name).write_bytes(change(draw, (own / name).read_bytes()))
        lora = {"finetuning_type": "lora", "lora_rank": 2, "lora_target": "q_proj"}
        keys = keys_of(folder, self.model, **lora, adapter_name_or_path=str(own))
        job = loaded(folder, **keys)
        model = build(job)
        Transforms(job).plan(model)
        weights.materialize(model, CPU, CPU)
        weights.load_pretrained(model, job, CPU)
        load_adapter(adapted(model), own)


def adapted(model: Any) -> Any:
    """Return the model with an adapter to load."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return inject_adapter_in_model(config, model)


RUNS = "open('RAN', 'w').close()\n"


class Kernels:
    """Kernel folders: metadata.json, the source of layers, names of builds."""

    def __init__(self, folder: Path) -> None:
        self.model = tiny_model(folder)

    def __call__(self, draw: Random, folder: Path) -> None:
        """Plan a job with one; nothing of it may run."""
        name = draw.choice(["torch-cpu", "torch-universal", "torch-cuda", "torch211-cxx11-cpu"])
        build_folder = folder / "kernel" / "build" / name
        build_folder.mkdir(parents=True)
        metadata: Any = {"id": "_fuzzed_1", "name": "x", "version": 1, "license": "MIT"}
        metadata |= {"backend": {"type": "cpu"}, "python-depends": []}
        source = (RUNS + LAYERS).encode()
        kind = draw.randrange(3)
        if kind == 0:
            metadata = mutate_json(draw, metadata)
        elif kind == 1:
            source = mutate_bytes(draw, source)
        (build_folder / "metadata.json").write_bytes(dumped(metadata))
        (build_folder / "layers.py").write_bytes(source)
        (build_folder / "__init__.py").write_text(RUNS)
        entry: Any = {"path": str(folder / "kernel"), "layers": ["RMSNorm"]}
        if kind == 2:
            entry = mutate_json(draw, entry)
        on = {"use_kernels": True, "kernel_name": [entry], "kernels_trust": []}
        try:
            planned(folder, **keys_of(folder, self.model, **on))
        except yaml.YAMLError:
            return  # not even a job file


class States:
    """Checkpoints of training: the manifest, DCP's metadata, the shards."""

    def __init__(self, folder: Path) -> None:
        from raytrain_adv.run.run import local_run
        from raytrain_adv.worker.train import train

        keys = {**tiny_keys(folder), "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
        keys |= {"use_cpu": True, "export_model": False}
        self.job = loaded(folder, **keys)
        run = local_run(self.job)
        train(self.job, run, lambda *a: None)  # type: ignore[arg-type,return-value]
        run.close()
        self.source = folder / "out" / "checkpoints"
        self.folder = folder

    def __call__(self, draw: Random, folder: Path) -> None:
        """Resume from one."""
        from raytrain_adv.checkpoint import save
        from raytrain_adv.checkpoint.folders import newest
        from raytrain_adv.storage.storage import Storage

        own = folder / "checkpoints"
        shutil.copytree(self.source, own)
        step = next(own.glob("*/step_*"))
        file = draw.choice(sorted(p for p in step.iterdir() if p.is_file()))
        change = mutate_file if file.suffix == ".json" else mutate_bytes
        file.write_bytes(change(draw, file.read_bytes()))
        found = newest(Storage.at(str(own)))
        if found is not None:
            model = build(self.job)
            weights.materialize(model, CPU, CPU)
            weights.init_from_scratch(model, self.job, CPU)
            save.load(found, model, torch.optim.AdamW(model.parameters()))


SLOWEST_TEMPLATE_S = 2.0


def shorten_limits() -> None:
    """Give templates less than the seconds that a mutated file may take in all."""
    limits.template_time.__wrapped__.__defaults__ = (SLOWEST_TEMPLATE_S,)  # type: ignore[attr-defined]
