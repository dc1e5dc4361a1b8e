"""A run compared with another one: compare_with."""

import pytest

from raytrain_adv.errors import StorageError
from raytrain_adv.report.build import against
from raytrain_adv.report.charts import plots as plots_of
from raytrain_adv.report.html import render
from raytrain_adv.report.record import RunReport, write
from raytrain_adv.report.summary import summary

FASTER = RunReport(
    status="done",
    train_loss=((1, 8.0), (2, 4.0)),
    eval_loss=((2, 5.05),),
    tokens_per_second_per_worker=1300.0,
    peak_memory_gib=9.0,
)


def other(folder, **changed) -> str:
    figures = {
        "eval_loss": ((2, 5.0),),
        "tokens_per_second_per_worker": 1000.0,
        "peak_memory_gib": 10.0,
        "job": {},
    }
    write(RunReport(status="done", **{**figures, **changed}), folder)
    return str(folder)


def test_loss_speed_and_memory_are_compared_with_the_other_run(make_job, tmp_path):
    job = make_job(compare_with=other(tmp_path / "other", job=make_job().flat()))
    baseline = against(FASTER, job).baseline
    assert baseline is not None
    assert baseline.final_eval_loss_change == pytest.approx(0.01)
    assert baseline.speedup == pytest.approx(1.3)
    assert baseline.memory_ratio == pytest.approx(0.9)
    assert baseline.changed_keys == ()


def test_runs_that_end_at_other_steps_are_not_compared_by_their_last_loss(make_job, tmp_path):
    folder = other(tmp_path / "other", eval_loss=((3, 5.0),))
    baseline = against(FASTER, make_job(compare_with=folder)).baseline
    assert baseline is not None and baseline.final_eval_loss_change is None


def test_keys_that_differ_are_named_and_both_curves_shown(make_job, tmp_path):
    folder = other(tmp_path / "other", job=make_job(learning_rate=0.5).flat())
    report = against(FASTER, make_job(compare_with=folder))
    page = render(report, [])
    assert "learning_rate: 0.5 then, 0.01 now" in page
    assert "the other" in page
    assert "eval loss +1.00%, 1.30 x the speed, 0.90 x the memory" in summary(report)


def test_a_folder_without_a_run_is_an_error(make_job, tmp_path):
    with pytest.raises(StorageError, match="no report to read"):
        against(FASTER, make_job(compare_with=str(tmp_path / "nothing")))


def test_evaluations_and_short_runs_are_drawn_as_measured_beside_another_run(make_job, tmp_path):
    """They were smoothed: a mean of three evaluations is none of the three."""
    folder = other(tmp_path / "other", eval_loss=((2, 5.0), (4, 1.0), (6, 3.0)))
    report = against(FASTER, make_job(compare_with=folder))
    plots = {plot.title.partition(",")[0]: plot.series for plot in plots_of(report, [])}
    assert plots["Training loss"][0].points == [(1, 8.0), (2, 4.0)]
    assert plots["Eval loss"][1].points == [(2, 5.0), (4, 1.0), (6, 3.0)]
    assert {series.style for series in plots["Eval loss"]} == {"dots"}
