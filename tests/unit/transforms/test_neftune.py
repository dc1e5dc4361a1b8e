"""NEFTune's noise: how large, on what, and that it is the same however the step is made up."""

import math

import pytest
import torch

from raytrain_adv import hardware
from raytrain_adv.errors import JobError, TrainingError
from raytrain_adv.model.build import build
from raytrain_adv.ops.noise import Noise, noise_of
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.neftune import Neftune
from tests.tiny_models import job_for, write_checkpoint

CPU = hardware.detect("cpu")
WIDTH, TIME = 32, 24
FLOAT32, DEVICE = torch.float32, torch.device("cpu")


def job_with(folder, kind="llama", **keys):
    checkpoint = write_checkpoint(kind, folder / "model")
    return job_for(checkpoint, folder, **{"neftune_noise_alpha": 5, **keys})


def noise(segments, *, seed=1, step=0, first=0, rows=None):
    hook = Noise(5.0)
    hook.seed, hook.step, hook.first, hook.segments = seed, step, first, segments
    return hook.made_for(torch.zeros(rows or len(segments), TIME, WIDTH))


def test_a_conversation_has_the_noise_of_its_own_length_in_packed_and_padded_rows():
    """The expected size is 5 / sqrt(length x features), whatever else is in the row."""
    made = noise(((4, 16), (16,)))
    for row, start, length in ((0, 0, 4), (0, 4, 16), (1, 0, 16)):
        part = made[row, start : start + length]
        bound = 5 / math.sqrt(length * WIDTH)
        assert part.abs().max() <= bound
        assert float(part.square().mean().sqrt()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not made[0, 20:].any() and not made[1, 16:].any()


def test_noise_depends_on_seed_step_and_place_alone():
    whole = noise(((8,), (9,), (10,)), step=3)
    assert torch.equal(noise(((10,),), step=3, first=2), whole[2:])  # another split of the step
    torch.rand(5)
    assert torch.equal(noise(((8,), (9,), (10,)), step=3), whole)
    for changed in ({"step": 4}, {"step": 3, "seed": 2}, {"step": 3, "first": 1}):
        assert not torch.equal(noise(((8,), (9,), (10,)), **changed), whole)
    assert not torch.equal(noise(((8, 8),))[0, :8], noise(((8, 8),))[0, 8:16])


def test_drawing_noise_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    noise(((8,),))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gemma2", "gpt2", "mixtral"])
def test_a_model_trains_with_noise_on_its_embeddings_and_evaluates_without(tmp_path, kind):
    job = job_with(tmp_path, kind)
    model = build(job)
    plans = Transforms(job).prepare(model, CPU)
    (fqn,) = plans["neftune"].changes
    model.to_empty(device="cpu")
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    for buffer in model.buffers():  # gemma's has a scale
        buffer.fill_(1)
    neftune = job.transform(Neftune)
    neftune.initialize(model, plans["neftune"], 7)
    neftune.begin_batch(model, 0, 0, ((6,),))
    ids = torch.arange(8).view(1, 8)
    embedding = model.get_submodule(fqn)
    plain = embedding.eval()(ids).detach()
    trained = embedding.train()(ids).detach()
    assert torch.equal(plain[0, 6:], trained[0, 6:])
    apart = (trained - plain)[0, :6]
    assert 0 < float(apart.abs().max()) <= 5 / math.sqrt(6 * WIDTH) * 1.001


def test_what_was_measured_before_training_is_told(tmp_path):
    job = job_with(tmp_path)
    model = build(job)
    plans = Transforms(job).install(
        model, Transforms(job).prepare(model, CPU), DEVICE, torch.bfloat16
    )
    assert "5 / sqrt(24 x 32) is 0.1804; root mean square 0.5" in plans["neftune"].notes[-1]


class Wrong(Noise):
    """Noise of the row's length, on padding too, as in transformers."""

    def made_for(self, output):
        bound = self.alpha / math.sqrt(output.shape[1] * output.shape[2])
        return torch.empty_like(output).uniform_(-bound, bound)


def test_noise_of_another_size_or_on_padding_stops_the_job(tmp_path):
    job = job_with(tmp_path)
    model = build(job)
    plans = Transforms(job).prepare(model, CPU)
    noise_of(model.model.embed_tokens).__class__ = Wrong
    with pytest.raises(TrainingError, match="The noise of NEFTune is wrong") as caught:
        Transforms(job).install(model, plans, DEVICE, FLOAT32)
    assert "padding has noise" in caught.value.found
    assert "it differs when it is drawn again" in caught.value.found
    assert "root mean square" in caught.value.found


def test_a_batch_it_was_not_told_of_is_refused(tmp_path):
    job = job_with(tmp_path)
    model = build(job)
    Transforms(job).prepare(model, CPU)
    model.to_empty(device="cpu")
    with pytest.raises(TrainingError, match="another batch"):
        model.model.embed_tokens(torch.zeros(2, 4, dtype=torch.int64))


@pytest.mark.parametrize("alpha", [None, 0, 0.0])
def test_none_and_zero_add_none(tmp_path, alpha):
    job = job_with(tmp_path, neftune_noise_alpha=alpha)
    assert not job.transform(Neftune).enabled


@pytest.mark.parametrize("alpha", [-1, True, "five", ".inf"])
def test_a_value_that_is_no_size_is_refused(tmp_path, alpha):
    with pytest.raises(JobError, match="neftune_noise_alpha"):
        job_with(tmp_path, neftune_noise_alpha=alpha)
