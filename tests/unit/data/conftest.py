"""Small real tokenizers, jobs and files for the tests of the data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from raytrain_adv.config.job import JobConfig
from raytrain_adv.config.sections import (
    DataConfig,
    ModelConfig,
    OutputConfig,
    ParallelConfig,
    RayConfig,
)
from raytrain_adv.config.training import TrainConfig
from raytrain_adv.transforms.vocabulary import Vocabulary
from tests.unit.data.sample_rows import TINY_LLAMA

MARKERS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
]

MakeJob = Callable[..., JobConfig]


CONFIG = '{"model_type": "llama", "vocab_size": 100000}'
"""Of a model that has a row for every token of any tokenizer here."""


@pytest.fixture
def make_job(tmp_path: Path) -> MakeJob:
    """A function from keys to a job with the shipped tokenizer and a cache of its own."""

    def make(**keys: Any) -> JobConfig:
        keys = {"model_name_or_path": str(TINY_LLAMA), "output_dir": str(tmp_path / "out"), **keys}
        keys.setdefault("tokenized_path", str(tmp_path / "cache"))
        keys.setdefault("cutoff_len", 128)
        sections = {
            "model": ModelConfig,
            "data": DataConfig,
            "train": TrainConfig,
            "parallel": ParallelConfig,
            "output": OutputConfig,
            "ray": RayConfig,
        }
        unknown = set(keys) - {key for s in sections.values() for key in s.model_fields}
        assert not unknown
        built = {
            name: s(**{k: v for k, v in keys.items() if k in s.model_fields})
            for name, s in sections.items()
        }
        return JobConfig(**built, transforms=(Vocabulary(),))

    return make


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """A function that writes rows to a file: JSON Lines, or an indented array for .json."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        if path.suffix == ".json":
            path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
        else:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            path.write_text("".join(lines), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """The shipped tokenizer."""
    return AutoTokenizer.from_pretrained(TINY_LLAMA)


@pytest.fixture(scope="session")
def marked_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the shipped tokenizer, the markers of all templates, and no chat template."""
    folder = tmp_path_factory.mktemp("marked")
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.add_tokens(MARKERS, special_tokens=True)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(CONFIG)
    return str(folder)


@pytest.fixture(scope="session")
def spacing_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer that puts a space before every text, as that of Llama 2 does."""
    folder = tmp_path_factory.mktemp("spacing")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    text = "Human: What is it? Assistant: It is a test.\nHow are you today? I am very well."
    tokenizer.train_from_iterator([text] * 4, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    (folder / "config.json").write_text(CONFIG)
    return str(folder)
