"""What a sweep leaves behind: sweep.json, its page, its table, their contract."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from raytrain_adv.config.sweep import METRICS, MetricName
from raytrain_adv.errors import StorageError
from raytrain_adv.report import sweep_record
from raytrain_adv.report.plot import Plot, Series, draw
from raytrain_adv.report.record import RunReport, read_record
from raytrain_adv.report.sweep_html import render, render_text, written
from raytrain_adv.report.sweep_record import SweepReport, TrialReport, best, metrics
from tests.unit.report.test_html import EVIL, Elements

DELAY = "fake_quant_after_n_steps"


def trial(metric: float | None, status: str = "done", **values: Any) -> TrialReport:
    name = ",".join(f"{key}={value}" for key, value in values.items())
    error = "It failed\n  found: <b>why</b>" if status == "failed" else None
    return TrialReport(
        **{"name": name, "values": values, "status": status, "metric": metric, "error": error},
        output_dir=f"saves/trials/{name}",
    )


def sweep_of(*trials: TrialReport, **changed: Any) -> SweepReport:
    keys = tuple(dict.fromkeys(key for t in trials for key in t.values))
    chosen = best(trials, "min")
    given = {"status": "done", "metric": "eval_loss", "mode": "min", **changed}
    return SweepReport(
        keys=keys, trials=trials, best=chosen.name if chosen else None, output_dir="o", **given
    )


DELAYS = sweep_of(
    trial(3.0, **{DELAY: 0}),
    trial(2.5, **{DELAY: 50}),
    trial(2.75, **{DELAY: 100}),
    trial(3.5, **{DELAY: "never"}),
)


def test_every_metric_has_a_value_in_the_report_of_a_run() -> None:
    report = RunReport(
        status="done",
        eval_loss=((1, 4.0), (9, 3.0)),
        train_loss=((1, 5.0), (9, 2.0)),
        tokens_per_second_per_worker=100.0,
        step_seconds=0.5,
        peak_memory_gib=7.0,
        mfu_bf16=0.4,
    )
    found = metrics(report)
    assert set(found) == set(METRICS) == set(get_args(MetricName)) <= set(TrialReport.model_fields)
    assert found["eval_loss"] == 3.0 and found["train_loss"] == 2.0
    assert found["tokens_per_second_per_worker"] == 100.0 and found["mfu_bf16"] == 0.4


def test_a_run_that_was_not_evaluated_has_no_loss() -> None:
    assert metrics(RunReport(status="done"))["eval_loss"] is None


def test_the_best_is_the_highest_or_the_lowest() -> None:
    trials = (trial(None, "failed", seed=0), trial(2.0, seed=1), trial(1.0, seed=2))
    assert best(trials, "min") == trials[2] and best(trials, "max") == trials[1]
    assert best(trials[:1], "min") is None


def test_the_delay_that_never_comes_is_a_line_across_the_plot() -> None:
    page = render(DELAYS)
    assert "PTQ (never)  3.5000" in page
    assert "[[0.0,3.0],[50.0,2.5],[100.0,2.75]]" in page
    assert page.count('class="key level"') == 1


def test_values_that_are_not_numbers_are_bars() -> None:
    page = render(sweep_of(trial(3.0, fp8=True), trial(2.0, fp8=False)))
    assert "by fp8" in page and "<svg" not in page and ">true<" in page


def test_rates_that_differ_much_lie_on_a_logarithmic_axis() -> None:
    rates = sweep_of(*(trial(3.0 + r, learning_rate=r) for r in (1e-5, 1e-4, 1e-3)))
    page = render(rates)
    assert "&#34;log&#34;:true" in page and ">0.0001</text>" in page
    (steps,) = draw([Plot("Loss", "", (Series("loss", [(1, 2.0), (1000, 1.0)], 1),))])
    assert '"log":false' in steps.data and '"x":[0.0,1000]' in steps.data


def test_a_plot_over_a_key_names_the_key_once() -> None:
    page = render(sweep_of(*(trial(3.0 + r, learning_rate=r) for r in (1e-5, 1e-4))))
    assert page.count('aria-label="Eval loss over learning_rate"') == 2  # page and phone


def test_the_page_shows_what_failed_as_text() -> None:
    page = render(sweep_of(trial(3.0, seed=1), trial(None, "failed", seed=2)))
    assert "&lt;b&gt;why&lt;/b&gt;" in page and "seed=2: failed" in page
    assert "1 of 2" in page


def test_text_from_outside_cannot_become_markup_in_a_sweep() -> None:
    """Names, swept values, errors, paths and notes may come from a job file or from data."""
    failed = trial(None, "failed", run_name=EVIL)
    done = [trial(3.0, run_name=f"{EVIL}{n}", learning_rate=n / 10) for n in (1, 2)]
    done = [t.model_copy(update={"model_dir": EVIL, "error": EVIL}) for t in done]
    texts = {"name": EVIL, "job_file": EVIL, "command": EVIL, "best_job": EVIL, "notes": (EVIL,)}
    whole = sweep_of(*done, failed, **texts, error=EVIL).model_copy(update={"output_dir": EVIL})
    for report in (whole, sweep_of(trial(1.0, **{EVIL: EVIL}), trial(2.0, **{EVIL: 1}))):
        found = Elements(render(report))
        assert found.tags.count("script") == 1 and "img" not in found.tags
        assert not [name for name, _ in found.attributes if name.startswith("on")]
        assert not [v for n, v in found.attributes if n == "href" and not v.startswith("trials/")]
        assert "<img src=x" in found.text and found.open == []


def test_a_page_without_any_result_shows_that_the_sweep_runs() -> None:
    page = render(sweep_of(trial(None, "waiting", seed=1), status="running"))
    assert "This sweep has not ended" in page


def test_the_table_has_a_line_for_each_trial_and_marks_the_best() -> None:
    shown = render_text(DELAYS).splitlines()
    assert shown[0].split()[:4] == [DELAY, "state", "eval", "loss"]
    assert [line.split()[1] for line in shown[1:5]] == ["done", "best", "done", "done"]
    failed = render_text(sweep_of(trial(None, "failed", seed=2)))
    assert "seed=2 failed:\n  It failed\n    found: <b>why</b>" in failed


def test_swept_values_are_written_as_in_the_job_file() -> None:
    assert [written(v) for v in (None, True, 0, 1, 0.5, "x")] == [
        "null",
        "true",
        "0",
        "1",
        "0.5",
        "x",
    ]


def test_sweep_json_is_read_as_it_was_written(tmp_path) -> None:
    sweep_record.write(DELAYS, tmp_path)
    path = tmp_path / "sweep.json"
    assert read_record(SweepReport, path) == DELAYS
    path.write_text("{}")
    with pytest.raises(StorageError, match="not one of this version"):
        read_record(SweepReport, path)


def test_every_field_of_the_sweeps_contract_has_its_sentence() -> None:
    for kind in (SweepReport, TrialReport):
        for name in kind.model_fields:
            assert kind.sentence(name).endswith("."), name
