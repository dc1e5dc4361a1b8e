"""A model's config.json that holds anything but a config is refused, and breaks nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raytrain_adv.data.tokens.tokenizer import load_tokenizer
from raytrain_adv.errors import JobError
from raytrain_adv.model.config_file import read_config
from tests.tiny_models import job_for


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '"text"',
        "{}",
        '{"model_type": 3}',
        '{"model_type": []}',
        '{"model_type": "nope"}',
        '{"model_type": "llama", "architectures": [3]}',
        '{"model_type": "llama", "quantization_config": "awq"}',
        '{"model_type": "llama", "quantization_config": [1]}',
        '{"model_type": "llama", "hidden_size": "x"}',
        '{"model_type": "llama", "rope_scaling": 5}',
        '{"model_type": "llama", "hidden_size": 0}',
        '{"model_type": "llama", "num_hidden_layers": 0}',
        '{"model_type": "llama", "intermediate_size": -1}',
        '{"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 3}',
        '{"model_type": "gpt2", "n_embd": 0}',
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(content)
    with pytest.raises(JobError) as caught:
        read_config(job_for(model, tmp_path))
    assert str(model) in str(caught.value)


def test_quantized_weights_are_refused_with_their_method(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    text = '{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}'
    (model / "config.json").write_text(text)
    with pytest.raises(JobError, match=r"quantization_config \(awq\)"):
        read_config(job_for(model, tmp_path))


def test_a_model_folder_with_a_pipe_in_it_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    os.mkfifo(model / "tokenizer_config.json")
    with pytest.raises(JobError, match=r"tokenizer_config\.json"):
        load_tokenizer(job_for(model, tmp_path))


def test_a_config_at_fault_is_not_blamed_on_the_tokenizer(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 0}')
    with pytest.raises(JobError, match=r"check its config\.json"):
        load_tokenizer(job_for(model, tmp_path))
