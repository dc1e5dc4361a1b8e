"""Packed conversations are kept apart in the way that a model takes, or the job is refused."""

import pytest
import torch

from raytrain_adv.errors import TrainingError
from raytrain_adv.model.packing import hand_masks
from raytrain_adv.run.run import local_run
from raytrain_adv.worker.trials.packing import check_packing
from tests.families import tiny_model
from tests.tiny_models import job_for

APART = {
    "llama": "positions",
    "mixtral": "positions",
    "gemma3_text": "positions",
    "gpt_oss": "masks",
    "roberta": "masks",  # its positions begin after that of padding
}
MIXING = ("qwen3_next", "mamba2", "falcon_h1", "lfm2", "granitemoehybrid", "bloom", "rwkv")


def tried(kind, tmp_path, **keys):
    job = job_for("none", tmp_path, neat_packing=True, use_cpu=True, **keys)
    model = tiny_model(kind)
    return model, check_packing(job, model, local_run(job))


@pytest.mark.parametrize(("kind", "expected"), APART.items())
def test_a_packed_conversation_has_the_logits_that_it_has_alone(kind, expected, tmp_path):
    model, way = tried(kind, tmp_path)
    assert way == expected
    assert all(p.grad is None for p in model.parameters()) and model.training
    first, second = torch.arange(9)[None], torch.arange(20, 40)[None]
    positions = torch.cat([torch.arange(9), torch.arange(20)])[None]
    model.eval()  # RoBERTa drops
    with torch.no_grad():
        packed = model(
            input_ids=torch.cat([first, second], 1), position_ids=positions, use_cache=False
        ).logits
        alone = model(input_ids=second).logits
    torch.testing.assert_close(packed[:, 9:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MIXING)
def test_a_model_that_mixes_packed_conversations_is_refused_by_name(kind, tmp_path):
    with pytest.raises(TrainingError, match="neat_packing") as refusal:
        tried(kind, tmp_path)
    assert type(tiny_model(kind)).__name__ in refusal.value.what
    assert "packing: false and neat_packing: false" in refusal.value.fix


def test_without_neat_packing_nothing_is_tried(tmp_path):
    job = job_for("none", tmp_path, packing=True, use_cpu=True)
    assert check_packing(job, tiny_model("mamba2"), local_run(job)) == "positions"


def test_masks_from_outside_keep_windows():
    model = tiny_model("gpt_oss").eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        plain = model(input_ids=ids, position_ids=ids, use_cache=False).logits
        hand_masks(model, torch.float32)
        assert torch.equal(model(input_ids=ids, position_ids=ids, use_cache=False).logits, plain)
