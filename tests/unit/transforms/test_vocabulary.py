"""What is trained next to adapters is told once, and not as frozen."""

import pytest

from raytrain_adv import hardware
from raytrain_adv.model.build import build
from raytrain_adv.transforms.applied import Transforms
from tests.tiny_models import job_for, write_checkpoint


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_weights_that_are_trained_in_full_are_not_counted_as_frozen(tmp_path, kind):
    folder = write_checkpoint(kind, tmp_path / "model")
    keys = {"finetuning_type": "lora", "lora_rank": 4, "additional_target": "embed_tokens"}
    job = job_for(folder, tmp_path / "job", **keys)
    model = build(job)
    total = sum(p.numel() for p in model.parameters())
    table = model.get_input_embeddings().weight.numel()
    plans = Transforms(job).plan(model, hardware.detect("cpu"))
    (note,) = plans["vocabulary"].notes
    assert note == (
        f"{table:,} weights are trained in full and saved with the adapters; the other "
        f"{total - table:,} of the model are frozen"
    )
    assert f"in adapters on a model of {total:,} (" in plans["lora"].notes[0]
