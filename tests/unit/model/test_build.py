"""The meta-device model, and what is said about models that cannot be trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from raytrain_adv.errors import JobError
from raytrain_adv.model.build import build, decoder_layers, head_fqn
from raytrain_adv.model.config_file import read_config
from raytrain_adv.model.files import nearest_folders
from raytrain_adv.model.vocabulary import read_tokenizer
from raytrain_adv.transforms.applied import Transforms
from tests.families import tiny_model
from tests.own_code import with_own_code
from tests.tiny_models import KINDS, job_for, write_checkpoint

LAYERS = {"gpt2": "transformer.h"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_built_without_memory_and_its_layers_and_head_are_found(
    kind: str, tmp_path: Path
) -> None:
    model = build(job_for(write_checkpoint(kind, tmp_path / "m"), tmp_path))
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert model.training and not model.config.use_cache
    stack = LAYERS.get(kind, "model.layers")
    assert [fqn for fqn, _ in decoder_layers(model)] == [f"{stack}.0", f"{stack}.1"]
    assert decoder_layers(model)[1][1] is model.get_submodule(f"{stack}.1")
    assert head_fqn(model) == "lm_head"
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == bool(model.config.tie_word_embeddings)


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({}, torch.float32),
        ({"bf16": True}, torch.float32),
        ({"pure_bf16": True}, torch.bfloat16),
        ({"bf16": True, "finetuning_type": "lora"}, torch.bfloat16),
        ({"finetuning_type": "lora"}, torch.float32),
    ],
)
def test_parameters_have_the_dtype_the_job_asks_for(
    keys: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = build(job_for(write_checkpoint("llama", tmp_path / "m"), tmp_path, **keys))
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("kind", "asked", "used"),
    [
        ("llama", "auto", "sdpa"),
        ("llama", "disabled", "eager"),
        ("llama", "sdpa", "sdpa"),
        # Gemma 2 caps attention scores, which PyTorch's fused attention cannot.
        ("gemma2", "auto", "eager"),
    ],
)
def test_the_requested_attention_is_used(kind: str, asked: str, used: str, tmp_path: Path) -> None:
    model = build(job_for(write_checkpoint(kind, tmp_path / "m"), tmp_path, flash_attn=asked))
    assert model.config._attn_implementation == used


def message(folder: Path | str, place: Path, **keys: Any) -> str:
    with pytest.raises(JobError) as caught:
        build(job_for(folder, place, **keys))
    assert caught.value.fix
    return str(caught.value)


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("asked", ["fa2", "fa3", "fa4"])
def test_a_flash_attention_that_is_not_installed_is_refused(asked: str, tmp_path: Path) -> None:
    text = message(write_checkpoint("llama", tmp_path / "m"), tmp_path, flash_attn=asked)
    assert f"flash_attn: {asked} needs the package flash-attn" in text


def test_an_attention_the_architecture_lacks_is_refused(tmp_path: Path) -> None:
    text = message(write_checkpoint("gemma2", tmp_path / "m"), tmp_path, flash_attn="sdpa")
    assert "does not support flash_attn: sdpa" in text


def test_a_misspelt_folder_names_the_nearest(tmp_path: Path) -> None:
    write_checkpoint("llama", tmp_path / "tiny-llama")
    text = message(tmp_path / "tiny-lama", tmp_path)
    assert "there is no model folder" in text and "tiny-llama" in text


def test_a_misspelt_folder_further_up_names_its_nearest(tmp_path: Path) -> None:
    for name in ("llamas", "module"):
        (tmp_path / name).mkdir()
    assert nearest_folders(tmp_path / "llama" / "model") == f"{tmp_path} has llamas"


def test_a_folder_without_config_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    (folder / "config.json").unlink()
    assert "no config.json in it; it holds" in message(folder, tmp_path)


def test_a_file_for_a_folder_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    assert "model_name_or_path is a file" in message(folder / "config.json", tmp_path)


def test_a_folder_without_weights_is_refused_unless_training_from_scratch(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    (folder / "model.safetensors").unlink()
    text = message(folder, tmp_path)
    assert "holds no weights" in text and "train_from_scratch: true" in text
    build(job_for(folder, tmp_path, train_from_scratch=True))


def test_pickled_weights_are_refused_with_the_command_that_converts_them(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "save_pretrained" in message(folder, tmp_path)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"architectures": ["BertForMaskedLM"], "model_type": "bert"},
            "is not a causal language model",
        ),
        (
            {
                "architectures": ["T5ForConditionalGeneration"],
                "model_type": "t5",
                "is_encoder_decoder": True,
            },
            "is not a causal",
        ),
        (
            {"architectures": ["ViTForImageClassification"], "model_type": "vit"},
            "is not a causal language model",
        ),
        ({"architectures": None, "model_type": "vit"}, "is not a causal language model"),
        ({"model_type": "no_such_kind"}, "transformers cannot build this model"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "quantized weights"),
        ({"hidden_size": "wide"}, "transformers cannot build this model"),
        ({"num_attention_heads": 0}, "transformers cannot build this model"),
        ({"text_config": {"a": {}}}, "the config of its text: {'a': {}}"),
        ({"sliding_window": {"a": 1}}, "sliding_window: {'a': 1} is not a number"),
        ({"max_position_embeddings": -1}, "max_position_embeddings: -1 is not positive"),
        ({"attention_dropout": 7.0}, "attention_dropout: 7.0 is not a share, 0 to 1"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers: 10,000,000 is more than 4,096"),
    ],
)
def test_configs_that_cannot_be_trained_are_refused(
    values: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    edit_config(folder, **values)
    assert words in message(folder, tmp_path)


def test_a_config_without_model_type_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    (folder / "config.json").write_text("{}")
    assert "does not name the kind of model" in message(folder, tmp_path)


def test_a_broken_config_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    (folder / "config.json").write_text("{")
    assert "config.json cannot be read" in message(folder, tmp_path)


def test_code_that_comes_with_a_model_runs_only_when_allowed(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    with_own_code(folder)
    assert "set trust_remote_code: true" in message(folder, tmp_path)
    model = build(job_for(folder, tmp_path, trust_remote_code=True))
    assert type(model).__name__ == "OwnModel"


def test_a_hub_model_that_cannot_be_reached_is_an_error_that_reports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = message("nobody/no-such-model", tmp_path, cache_dir=str(tmp_path / "cache"))
    assert "There is no folder nobody/no-such-model" in text and "cannot be fetched" in text
    assert "make the Hub reachable" in text


def test_a_multimodal_model_is_refused(tmp_path: Path) -> None:
    text_part = AutoConfig.for_model(
        "gemma3_text", hidden_size=32, intermediate_size=64, num_hidden_layers=1
    )
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = AutoConfig.for_model("gemma3", text_config=text_part.to_dict(), vision_config=vision)
    config.save_pretrained(tmp_path / "m")
    assert "multimodal" in message(tmp_path / "m", tmp_path, train_from_scratch=True)


@pytest.mark.parametrize("name", ["a/b/c/d", "../..//x", "ü/x", "a--b/x", "x" * 97, "x/y.git"])
def test_a_name_that_is_none_of_the_hub_is_a_missing_folder_in_plan_and_run(
    name: str, make_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(model_name_or_path=name)
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")  # what lies above is known
    for read in (read_tokenizer, read_config):
        with pytest.raises(JobError, match="there is no model folder"):
            read(job)


def test_falcons_linears_are_plain_ones_that_qat_leaves_alone(tmp_path: Path) -> None:
    """Its class differs from PyTorch's by the order of operations; torchao's weights do not load
    there, as it transposes them.
    """
    tiny_model("falcon").save_pretrained(tmp_path / "m")
    job = job_for(tmp_path / "m", tmp_path, fp8=True, fp8_allow_cpu=True, fp8_min_features=16)
    model = build(job)
    name = "transformer.h.0.mlp.dense_h_to_4h"
    assert type(model.get_submodule(name)) is torch.nn.Linear
    assert name in Transforms(job).prepare(model)["fp8"].changes
    rounded = job_for(tmp_path / "m", tmp_path, enable_qat=True)
    with pytest.raises(JobError, match="would not round any linear") as refusal:
        Transforms(rounded).prepare(build(rounded))
    assert "transformers multiplies with its weight" in refusal.value.found
