"""What a report states of a quantized run's losses: a share only if it means something."""

import pytest

from raytrain_adv.report import variants
from raytrain_adv.report.html import render
from raytrain_adv.report.parts import TransformReport, Variant
from raytrain_adv.report.record import RunReport
from raytrain_adv.report.summary import summary

TWIN = ("bf16 twin", "PTQ of the twin")


def report_of(bf16: float, ptq: float, qat: float, twin: bool = False) -> RunReport:
    names = (*(TWIN if twin else ("bf16", "PTQ")), "QAT")
    steps = (8, 8, 8) if twin else (4, 4, 8)
    found = tuple(
        Variant(name=name, step=step, loss=loss, perplexity=1.0)
        for name, step, loss in zip(names, steps, (bf16, ptq, qat), strict=True)
    )
    return RunReport(
        status="done",
        variants=found,
        recovered=variants.recovered(found),
        eval_loss=((8, qat),),
        transforms={"qat": TransformReport(changed=1, skipped=0)},
    )


@pytest.mark.parametrize("twin", [False, True])
def test_the_share_is_of_what_ptq_loses(twin: bool) -> None:
    report = report_of(2.0, 2.1, 2.02, twin)
    assert report.recovered == pytest.approx(0.8)
    sentence = variants.sentence(report)
    assert "QAT recovered 80% of the 0.1000" in sentence
    assert ("compare: true" in sentence) is not twin


def test_no_share_is_stated_of_next_to_nothing() -> None:
    report = report_of(6.9221, 6.92212, 6.8838)
    assert report.recovered is None
    assert "next to nothing" in variants.sentence(report)


def test_losses_of_a_task_that_is_solved_say_something() -> None:
    report = report_of(0.0006, 2.5, 0.0009, twin=True)
    assert [row[2] for row in variants.table_rows(report)] == ["0.000600", "2.5000", "0.000900"]
    assert [row[4] for row in variants.table_rows(report)] == ["-", "4,167 times", "+50.00%"]
    assert "(both losses are 0)" in variants.sentence(report_of(0.0, 0.0, 0.0, twin=True))


def test_what_training_gained_since_the_switch_is_not_reported_as_recovered() -> None:
    report = report_of(7.0, 7.1, 6.0)
    assert report.recovered is None
    assert "does not measure rounding; compare: true" in variants.sentence(report)


def test_nothing_is_compared_with_bf16_of_an_earlier_step() -> None:
    """It would be what has been trained since: QAT read as 7 % better than bf16."""
    shares = [row[-1] for row in variants.table_rows(report_of(7.0, 7.1, 6.0))]
    assert shares == ["-", "+1.43%", "-"]
    assert variants.table_rows(report_of(2.0, 2.1, 2.02, twin=True))[-1][-1] == "+1.00%"


def test_qat_below_its_twin_has_recovered_more_than_all() -> None:
    assert report_of(2.0, 2.1, 1.99, twin=True).recovered == pytest.approx(1.1)


def test_a_run_without_a_ptq_to_compare_with_reports_that() -> None:
    report = report_of(2.0, 2.1, 2.02)
    report = report.model_copy(update={"variants": report.variants[2:]})
    assert "no PTQ to compare QAT with" in variants.sentence(report)


def test_console_and_report_show_that_evaluation_runs_fake_quantized() -> None:
    report = report_of(2.0, 2.1, 2.02)
    assert "2.0200 (step 8), fake-quantized" in summary(report)
    rows = [{"kind": "eval", "step": 8, "loss": 2.02, "how": "fake-quantized"}]
    assert "eval, fake-quantized" in render(report, rows)
    plain = report.model_copy(update={"transforms": {}})
    assert "fake-quantized" not in summary(plain)


def test_console_and_report_show_the_share_of_exact_answers_before_and_after() -> None:
    report = report_of(2.0, 2.1, 2.02)
    assert "exact" not in summary(report)
    report = report.model_copy(update={"exact_answers": ((0, 0.0), (4, 0.5), (8, 0.985))})
    assert "0.0% (step 0) -> 98.5% (step 8) of the held-out answers" in summary(report)
    rows = [{"kind": "eval", "step": s, "loss": 2, "exact_answers": s / 8} for s in (0, 4, 8)]
    page = render(report, rows)
    assert "98.5%" in page and "0.0% at step 0" in page and "held-out answers" in page


@pytest.mark.parametrize(("best", "loss"), [(4, 1.0), (None, 3.0)])
def test_the_loss_of_the_converted_model_is_that_of_the_exported_step(
    best: int | None, loss: float
) -> None:
    losses = {2: 2.0, 4: 1.0, 6: 3.0}
    rows = [
        {"kind": "eval", "step": step, "loss": value, "how": "fake-quantized"}
        for step, value in losses.items()
    ]
    rows += [] if best is None else [{"kind": "event", "event": "best", "step": best}]
    assert variants.converted_loss(rows) == loss


def test_a_run_that_converts_nothing_has_no_converted_loss() -> None:
    assert variants.converted_loss([{"kind": "eval", "step": 2, "loss": 2.0}]) is None
