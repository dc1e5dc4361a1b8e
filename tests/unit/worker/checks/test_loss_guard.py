"""Which step's loss is bad, and what follows."""

import json

import pytest
import torch

from raytrain_adv.config.rules import contradictions
from raytrain_adv.data.batches.loader import Batches
from raytrain_adv.data.prepare import prepare
from raytrain_adv.errors import TrainingError
from raytrain_adv.run.run import local_run
from raytrain_adv.run.schedule import resolve_arithmetic
from raytrain_adv.worker.checks.loss_guard import IN_A_ROW, MOST_KEPT, LossGuard


@pytest.fixture
def guard(make_job):
    """Make the guard of a job with these keys, over four label tokens a step."""

    def make(**changed):
        job = make_job(**changed)
        data = prepare(job, lambda message: None)
        arithmetic = resolve_arithmetic(job, len(data.train), world_size=1)
        batches = Batches(job, data.train, arithmetic, rank=0, pad_token_id=0)
        return LossGuard(job, local_run(job), batches, lambda step: ())

    return make


def judged(guard: LossGuard, step: int, loss: float, norm: float = 1.0) -> bool:
    total = torch.tensor(loss * 4, dtype=torch.float64)
    return guard.must_skip(step, total, 4, torch.tensor(norm))


def test_nothing_is_read_where_neither_skipping_nor_a_factor_is_set(guard):
    plain = guard()
    assert not plain.is_active and not judged(plain, 0, float("nan"))


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (2.0, float("inf"))])
def test_what_is_not_finite_is_skipped_counted_and_kept(guard, tmp_path, loss, norm):
    skipping = guard(on_bad_loss="skip")
    assert not judged(skipping, 0, 2.0)
    assert judged(skipping, 1, loss, norm) and skipping.num_skipped == 1
    kept = json.loads((tmp_path / "out" / "bad_batches" / "step_00000002.json").read_text())
    expected = [int(i) for i in skipping.batches.indices(1)]
    assert [one["sequence"] for one in kept["sequences"]] == expected
    assert "Count to" in kept["sequences"][0]["text"]
    assert len(kept["sequences"][0]["input_ids"]) == len(kept["sequences"][0]["labels"])


@pytest.mark.parametrize("warmup", [{}, {"warmup_ratio": 0.1}, {"warmup_steps": 1}])
def test_a_stop_advises_no_key_that_the_job_has(guard, warmup):
    with pytest.raises(TrainingError) as error:
        judged(guard(bad_loss_factor=3.0, **warmup), 0, float("nan"))
    assert ("warmup_ratio" in error.value.fix) == (not warmup)
    skipping = guard(on_bad_loss="skip", **warmup)
    with pytest.raises(TrainingError, match="in a row") as error:
        for step in range(10):
            judged(skipping, step, float("nan"))
    assert "on_bad_loss" not in error.value.fix


def test_a_loss_above_the_factor_stops_the_run_and_names_the_file_of_its_batch(guard, tmp_path):
    stopping = guard(bad_loss_factor=3.0)
    for step in range(5):
        assert not judged(stopping, step, 2.0)
    assert not judged(stopping, 5, 5.9)
    with pytest.raises(TrainingError) as error:
        judged(stopping, 6, 6.1)
    assert "optimizer step 7: loss 6.1" in error.value.found
    assert "bad_loss_factor: 3 times the median" in error.value.found
    assert str(tmp_path / "out" / "bad_batches" / "step_00000007.json") in error.value.found
    assert "on_bad_loss: skip" in error.value.fix


def test_the_first_losses_are_held_against_nothing(guard):
    skipping = guard(on_bad_loss="skip", bad_loss_factor=1.5)
    assert not any(judged(skipping, step, loss) for step, loss in enumerate([2.0, 9.0, 2.0]))


def test_a_skipped_loss_is_no_measure_for_those_that_follow(guard):
    skipping = guard(on_bad_loss="skip", bad_loss_factor=2.0)
    for step in range(5):
        judged(skipping, step, 2.0)
    assert all(judged(skipping, 5 + n, 100.0) for n in range(6))
    assert not judged(skipping, 11, 2.0) and skipping.recent == [2.0] * 6


def test_bad_steps_in_a_row_end_the_run_and_few_batches_are_kept(guard, tmp_path):
    skipping = guard(on_bad_loss="skip")
    for step in range(2 * MOST_KEPT + 2):
        if step % 2:
            judged(skipping, step, float("inf"))
        else:
            judged(skipping, step, 2.0)
    assert len(list((tmp_path / "out" / "bad_batches").iterdir())) == MOST_KEPT
    with pytest.raises(TrainingError, match="in a row"):
        for step in range(100, 100 + IN_A_ROW):
            judged(skipping, step, float("nan"))


def test_what_is_done_with_a_bad_loss_may_change_as_the_run_goes_on(make_job):
    """A run that NaN has stopped is resumed with on_bad_loss: skip."""
    stopped, goes_on = make_job(), make_job(on_bad_loss="skip", step_timeout=60)
    assert stopped.fingerprint() == goes_on.fingerprint()
    assert not list(contradictions(goes_on))
