from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytrain_adv.errors import JobError
from raytrain_adv.run.schedule import Arithmetic, resolve_arithmetic


def arithmetic(**changed: Any) -> Arithmetic:
    values: dict[str, Any] = {
        "num_sequences": 100,
        "world_size": 1,
        "micro_batch": 8,
        "accumulation_steps": 1,
        "global_batch": 8,
        "total_steps": 25,
        "warmup_steps": 0,
        "save_strategy": "no",
        "save_every": 0,
        "eval_strategy": "no",
        "eval_every": 0,
        "filled_sequences": 0,
    }
    return Arithmetic(**{**values, **changed})


def test_the_batch_is_rows_times_passes_times_workers(make_job: Any) -> None:
    job = make_job(per_device_train_batch_size=3, gradient_accumulation_steps=4)
    assert resolve_arithmetic(job, 1000, 5).global_batch == 60


def test_workers_that_share_sequences_count_once(make_job: Any) -> None:
    keys = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
    job = make_job(**keys, ray_num_workers=6, sequence_parallel_size=2)
    found = resolve_arithmetic(job, 1000, 6)
    assert found.global_batch == 3 * 4 * 3 and found.accumulation_steps == 4
    with pytest.raises(JobError, match="5 workers, 2 for each sequence"):
        resolve_arithmetic(job, 1000, 5)


def test_fewer_workers_of_an_elastic_job_make_the_same_batch_in_more_passes(make_job: Any) -> None:
    job = make_job(
        ray_num_workers=[2, 8],
        max_failures=-1,
        gradient_accumulation_steps=3,
        save_strategy="steps",
    )
    found = {n: resolve_arithmetic(job, 1000, n) for n in (2, 4, 8)}
    assert {n: a.accumulation_steps for n, a in found.items()} == {2: 12, 4: 6, 8: 3}
    assert {a.global_batch for a in found.values()} == {2 * 3 * 8}
    with pytest.raises(JobError, match="numbers that work: 1, 2, 3, 4, 6, 8, 12, 24"):
        resolve_arithmetic(job, 1000, 5)


def test_epochs_round_the_last_batch_up_and_report_what_fills_it(make_job: Any) -> None:
    job = make_job(max_steps=-1, num_train_epochs=2.0, per_device_train_batch_size=8)
    result = resolve_arithmetic(job, 101, 1)
    assert result.total_steps == 26
    assert result.filled_sequences == 26 * 8 - 202
    assert result.steps_per_epoch == 13


def test_max_steps_wins_over_epochs(make_job: Any) -> None:
    result = resolve_arithmetic(make_job(max_steps=7, num_train_epochs=50.0), 101, 2)
    assert result.total_steps == 7
    assert result.filled_sequences == 0


def test_a_share_of_an_epoch_is_not_lengthened_by_rounding_noise(make_job: Any) -> None:
    job = make_job(max_steps=-1, num_train_epochs=0.1, per_device_train_batch_size=1)
    assert resolve_arithmetic(job, 30, 1).total_steps == 3  # 0.1 * 30 is 3.0000000000000004


def test_shares_of_all_steps_become_steps(make_job: Any) -> None:
    job = make_job(
        max_steps=50,
        val_size=4,
        warmup_ratio=0.1,
        save_strategy="steps",
        save_steps=0.25,
        eval_strategy="steps",
        eval_steps=0.5,
    )
    result = resolve_arithmetic(job, 1000, 1)
    assert (result.warmup_steps, result.save_every, result.eval_every) == (5, 13, 25)


def test_eval_steps_default_to_logging_steps(make_job: Any) -> None:
    job = make_job(eval_strategy="steps", logging_steps=3, val_size=4)
    assert resolve_arithmetic(job, 100, 1).eval_every == 3


def test_no_sequences_are_refused(make_job: Any) -> None:
    with pytest.raises(JobError, match="nothing to train on"):
        resolve_arithmetic(make_job(), 0, 1)


def test_a_run_ends_with_a_checkpoint_unless_none_are_wanted() -> None:
    assert arithmetic(save_strategy="steps", save_every=1000).saves_after(25)
    assert not arithmetic(save_strategy="no").saves_after(25)


def test_a_run_always_ends_with_an_evaluation() -> None:
    assert arithmetic(eval_strategy="no").evaluates_after(25)


def test_an_epoch_is_saved_after_the_step_that_completes_it() -> None:
    a = arithmetic(save_strategy="epoch", total_steps=38)  # epochs end within steps 13, 25 and 38
    assert [step for step in range(1, 39) if a.saves_after(step)] == [13, 25, 38]


@given(
    num_sequences=st.integers(1, 60),
    global_batch=st.integers(1, 80),
    total_steps=st.integers(1, 60),
    strategy=st.sampled_from(["no", "steps", "epoch"]),
    every=st.integers(1, 70),
)
def test_counts_of_saves_and_evaluations_are_those_of_the_steps(
    num_sequences: int, global_batch: int, total_steps: int, strategy: Any, every: int
) -> None:
    a = arithmetic(
        num_sequences=num_sequences,
        global_batch=global_batch,
        total_steps=total_steps,
        save_strategy=strategy,
        save_every=every,
        eval_strategy=strategy,
        eval_every=every,
    )
    steps = range(1, total_steps + 1)
    assert a.num_saves == sum(a.saves_after(step) for step in steps)
    assert a.num_evals == sum(a.evaluates_after(step) for step in steps)
