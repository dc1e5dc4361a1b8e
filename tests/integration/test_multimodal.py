"""Multimodal checkpoints are trained on text: on ranks, resumed, exported, adapted."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    Gemma3ForConditionalGeneration,
    Qwen3_5ForConditionalGeneration,
)

from tests.multimodal_models import write_multimodal
from tests.workers import losses, run_workers

CLASSES = {
    "gemma3": Gemma3ForConditionalGeneration,
    "qwen3_5": Qwen3_5ForConditionalGeneration,
}


@pytest.mark.parametrize("kind", ["gemma3", pytest.param("qwen3_5", marks=pytest.mark.slow)])
def test_ranks_train_the_text_part_and_export_the_whole(kind, job_file, tmp_path):
    folder = write_multimodal(kind, tmp_path / "checkpoint")
    base = {
        "model_name_or_path": str(folder),
        "train_from_scratch": False,
        "template": "default",
        "learning_rate": 1e-3,
        "max_steps": 4,
    }

    def job(name, **changed):
        return job_file(f"{name}.yaml", **{"output_dir": str(tmp_path / name), **base, **changed})

    saved = {"save_strategy": "steps", "save_steps": 2}
    adapted = {"finetuning_type": "lora", "learning_rate": 1e-2}
    run_workers(1, job("one", gradient_accumulation_steps=2))
    run_workers(2, job("two"), job("part", **saved), job("lora", **adapted))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-5)
    first, *_, last = losses(tmp_path / "one").values()
    assert last < first
    (tmp_path / "part/checkpoints/local/step_00000004/manifest.json").unlink()
    run_workers(
        2, job("part2", output_dir=str(tmp_path / "part"), resume_from_checkpoint=True, **saved)
    )
    assert losses(tmp_path / "part") == losses(tmp_path / "two")

    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "two/model"))
    changed = {n for n in before if not torch.equal(before[n].float(), after[n].float())}
    assert before.keys() == after.keys()
    assert changed == {n for n in before if "vis" not in n and "multi_modal" not in n}
    CLASSES[kind].from_pretrained(tmp_path / "two/model")
    AutoTokenizer.from_pretrained(tmp_path / "two/model")
    check_adapter(CLASSES[kind], folder, tmp_path / "lora/model")


def check_adapter(kind, base: Path, adapter: Path) -> None:
    """Load the adapter on the model's own class, and find it in use, whole, and on text alone."""
    model = kind.from_pretrained(base, dtype=torch.float32).eval()
    ids = torch.arange(3, 27).reshape(2, 12)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(model, adapter).eval()
        assert float((adapted(input_ids=ids).logits - plain).abs().max()) > 1e-3
    held = load_file(adapter / "adapter_model.safetensors")
    state = {n.replace(".default", ""): p for n, p in adapted.named_parameters() if "lora_" in n}
    assert state.keys() == held.keys()
    assert all(torch.equal(state[n], held[n]) for n in held)
    assert not any("vis" in n for n in state)
