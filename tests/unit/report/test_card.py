"""Model cards: what the Hub reads, and what is true of the folder."""

import json
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from raytrain_adv.report.card import write_card, write_cards
from raytrain_adv.report.record import RunReport

LORA = {"finetuning_type": "lora", "train_from_scratch": False, "bf16": True}
W4A16 = {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}


def folder_with(path: Path, **files) -> Path:
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def carded(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_an_adapters_card_names_its_base_keys_and_figures_and_no_folder_of_this_machine(
    make_job, tmp_path
):
    job = make_job(**LORA, model_name_or_path="org/base", dataset="org/rows", val_size=4)
    folder = folder_with(tmp_path / "out" / "model", adapter_config={})
    report = RunReport(
        status="done",
        steps=6,
        job=job.flat(),
        train_loss=((6, 2.5),),
        eval_loss=((3, 2.0), (6, 1.0)),
        model_dir=str(folder),
        device="CPU",
        world_size=2,
    )
    write_cards(report, job)
    card = carded(folder)
    assert (card.data.base_model, card.data.datasets) == ("org/base", ["org/rows"])
    assert (card.data.library_name, card.data.license) == ("peft", None)
    assert {"lora", "raytrain-adv"} <= set(card.data.tags)
    found = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert found == {"loss": 1.0, "perplexity": 2.718282}
    assert "loss_kernel" not in card.data.tags
    code = card.text.partition("```python\n")[2].partition("```")[0]
    assert code.rindex("import ") < code.index("tokenizer =")
    assert "PeftModel.from_pretrained(base" in card.text and "--enable-lora" in card.text
    assert "lora" in card.text and "2 x CPU" in card.text
    assert str(tmp_path) not in str(card)


def test_a_card_lists_only_keys_that_differ_from_their_defaults(make_job, tmp_path):
    at_default = {"stage": "sft", "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"}
    job = make_job(**LORA | at_default, resume_from_checkpoint=None, lora_alpha=4)
    write_card(folder := folder_with(tmp_path / "model", adapter_config={}), job)
    keys = yaml.safe_load(carded(folder).text.partition("```yaml\n")[2].partition("```")[0])
    assert keys["lora_alpha"] == 4 and not {*at_default, "resume_from_checkpoint"} & keys.keys()


def test_a_local_base_is_named_but_not_linked_and_lends_its_license(make_job, tmp_path):
    base = folder_with(tmp_path / "base-model", config={})
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\nhello\n")
    job = make_job(**LORA, model_name_or_path=str(base))
    write_card(folder := folder_with(tmp_path / "model", config={"dtype": "bfloat16"}), job)
    card = carded(folder)
    assert (card.data.base_model, card.data.license) == (None, "apache-2.0")
    assert "base-model" in card.text and "vllm serve" in card.text and "bfloat16" in card.text
    assert card.data.eval_results is None and str(tmp_path) not in str(card)


def test_each_form_is_loaded_by_what_reads_it(make_job, tmp_path):
    job = make_job()
    forms = {
        "engine": W4A16,
        "torchao": {"quantization_config": {"quant_method": "torchao"}},
        "gguf": {},
        "adapted": W4A16,
    }
    texts = {}
    for name, config in forms.items():
        folder = folder_with(tmp_path / name, config=config)
        if name == "gguf":
            (folder / "model.gguf").touch()
        if name == "adapted":
            (folder / "adapter_config.json").write_text("{}")
        write_card(folder, job, note="A note.")
        texts[name] = carded(folder).text
    assert "pip install torch transformers compressed-tensors" in texts["engine"]
    assert "vllm serve engine" in texts["engine"]
    assert "transformers torchao" in texts["torchao"] and "vllm" not in texts["torchao"]
    assert "llama-server -m gguf/model.gguf" in texts["gguf"]
    assert "CompressedTensorsConfig(dequantize=True)" in texts["adapted"]
    assert "CompressedTensorsConfig" not in texts["engine"]
    assert all("A note." in text for text in texts.values())


def test_of_a_converted_model_only_the_converted_one_has_the_held_out_loss(make_job, tmp_path):
    model = folder_with(tmp_path / "out" / "model", config={})
    converted = folder_with(tmp_path / "out" / "model-quantized", config=W4A16)
    report = RunReport(
        status="done",
        eval_loss=((6, 1.5),),
        model_dir=str(model),
        quantized_dir=str(converted),
        quantized_eval_loss=1.5,
    )
    write_cards(report, make_job())
    assert carded(model).data.eval_results is None
    assert carded(converted).data.eval_results[0].metric_value == 1.5
