import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from raytrain_adv.report.html import render, write_html
from raytrain_adv.report.parts import (
    Baseline,
    Failure,
    NodeReport,
    PreflightReport,
    Sample,
    TransformReport,
)
from raytrain_adv.report.plot import Drawing, Mark, Plot, Series, draw, thinned
from raytrain_adv.report.record import RunReport
from raytrain_adv.storage.metrics_file import MetricsFile

EVIL = "</pre></script><script>alert('x')</script><img src=x onerror=alert(1)>\x00"


class Elements(HTMLParser):
    """Collects what a browser would take for elements, and checks that they are closed."""

    VOID = frozenset({"meta", "path", "br"})

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(document)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def train_rows(num_rows):
    return [
        {
            "kind": "train",
            "step": step,
            "loss": 1.0 + 5 / step,
            "learning_rate": 1e-4,
            "grad_norm": 1.0,
            "step_s": 0.5,
            "data_wait_s": 0.01,
            "tokens_per_second_per_worker": 1000.0,
            "peak_memory_gib": 3.0,
        }
        for step in range(1, num_rows + 1)
    ]


def evil_report():
    reasons = {EVIL: 1}
    transform = TransformReport(
        changed=1, skipped=1, changed_modules=(EVIL,), skipped_reasons=reasons, notes=(EVIL,)
    )
    rows = {"read": 2, "used": 1, "unusable": 1, "unusable_reasons": reasons}
    rows["unusable_examples"] = [{"where": "data.jsonl:17", "reason": EVIL}]
    return RunReport(
        status="failed",
        error=EVIL,
        failure=Failure(kind="E", what=EVIL, found=EVIL, fix=EVIL, exit_code=3, trace=EVIL),
        run_name=EVIL,
        device=EVIL,
        world_size=2,
        job={"dataset": EVIL},
        versions={EVIL: EVIL},
        transforms={EVIL: transform},
        data={"rows": rows, "train": {"rows": 1}, EVIL: EVIL},
        batch={EVIL: EVIL},
        samples=[Sample(prompt=EVIL, answer=EVIL, reference=EVIL)],
        timeline={EVIL: 1.0},
        predicted_memory={"parameters": 1.0, "peak": EVIL, "explanations": {EVIL: EVIL}},
        notes=(EVIL,),
    )


def test_text_from_outside_cannot_become_markup():
    events = [{"kind": "event", "event": "x", "message": EVIL, "time": 0.0}]
    found = Elements(render(evil_report(), [*train_rows(3), *events]))
    assert found.tags.count("script") == 1
    assert "img" not in found.tags
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert found.text.count("<img src=x") >= 15


def test_neither_a_file_s_name_nor_a_baseline_nor_a_node_becomes_markup():
    node = NodeReport(
        address=EVIL, used=False, workers=0, gpus=(EVIL,), reason=EVIL, found=EVIL,
        driver_version=EVIL, versions={EVIL: EVIL},
    )  # fmt: skip
    preflight = PreflightReport(nodes=(node,), warnings=(EVIL,))
    baseline = Baseline(output_dir=EVIL, changed_keys=(EVIL,))
    report = RunReport(
        status="done", job_file=EVIL, command=EVIL, overrides=(EVIL,), model_dir=EVIL,
        attention=EVIL, baseline=baseline, preflight=preflight, job={EVIL: [EVIL]},
        quantized_dir=EVIL, quantized_comparison=EVIL,
    )  # fmt: skip
    found = Elements(render(report, train_rows(3)))
    assert found.tags.count("script") == 1 and "img" not in found.tags
    assert found.text.count("<img src=x") >= 8 and found.open == []


def test_a_node_without_a_gpu_has_no_empty_cells():
    node = NodeReport(address="10.0.0.1", used=True, workers=2, gpus=())
    report = RunReport(status="done", preflight=PreflightReport(nodes=(node,), warnings=()))
    page = render(report, train_rows(3))
    assert "10.0.0.1" in page and re.search(r"<td[^>]*>\s*</td>", page) is None


def test_every_element_is_closed():
    assert Elements(render(evil_report(), train_rows(50))).open == []


def test_the_page_loads_nothing_from_elsewhere():
    found = Elements(render(evil_report(), train_rows(3)))
    links = [value for name, value in found.attributes if name in ("src", "href", "xlink:href")]
    assert [link for link in links if not link.startswith("#")] == []
    page = render(RunReport(status="done"), train_rows(3))
    assert "url(" not in page and "@import" not in page and "http://" not in page


def test_a_failed_run_shows_the_error_with_found_and_fix_before_the_figures():
    failure = Failure(kind="E", what="It broke", found="a number", fix="another one", exit_code=3)
    page = render(RunReport(status="failed", error="x", failure=failure), [])
    places = [page.index(words) for words in ("It broke", "a number", "another one", "Steps")]
    assert places == sorted(places)


def test_a_refused_run_is_not_reported_as_trained():
    refused = RunReport(status="failed", error="FP8 requires Hopper architecture")
    assert "the run ended before its plan was made" in render(refused, [])
    assert "trained as it is" in render(RunReport(status="done", world_size=1), [])


def test_memory_on_a_cpu_is_not_compared_with_a_prediction_of_other_things():
    sizes = {"predicted_memory": {"parameters": 1.0}, "predicted_memory_gib": 1.5}
    report = RunReport(status="done", peak_memory_gib=3.0, **sizes)
    on_cpu = Elements(render(report.model_copy(update={"device": "CPU (x86)"}), [])).text
    assert "predicted peak of tensors" in on_cpu and "peak of the process" in on_cpu
    assert "cannot be compared" in on_cpu and "measured peak" not in on_cpu
    on_gpu = Elements(render(report.model_copy(update={"device": "NVIDIA H100"}), [])).text
    assert "measured peak" in on_gpu and "cannot be compared" not in on_gpu


def test_unusable_rows_are_shown_with_file_and_line():
    assert "data.jsonl:17" in Elements(render(evil_report(), [])).text


def test_plot_loss_false_leaves_out_the_plots(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl", None) as file:
        for row in train_rows(5):
            file.append(row)
    report = RunReport(status="done")
    with_plots = write_html(report, tmp_path).read_text()
    without = write_html(report, tmp_path, plots=False).read_text()
    assert "<svg" in with_plots
    assert "<svg" not in without


def test_a_report_of_a_hundred_thousand_rows_stays_small():
    assert len(render(RunReport(status="done"), train_rows(100_000))) < 250_000


def test_resumes_are_marked_in_the_plots():
    event = {"kind": "event", "event": "resume", "step": 4, "message": "Resumed.", "time": 0.0}
    assert "resumed</span>" in render(RunReport(status="running"), [*train_rows(9), event])


def test_a_loss_that_is_not_finite_is_marked():
    bad = {"kind": "train", "step": 4, "loss": None, "non_finite": {"loss": "nan"}}
    assert "loss is nan" in render(RunReport(status="failed"), [*train_rows(3), bad])


def test_thinning_keeps_spikes_and_both_ends():
    points = [(float(x), math.sin(x / 50)) for x in range(5000)]
    points[1234] = (1234.0, 50.0)
    kept = thinned(points, 200)
    assert len(kept) <= 200
    assert {points[0], points[1234], points[-1]} <= set(kept)


def drawing(*points: tuple[float, float], **plot) -> Drawing:
    return draw([Plot("Loss", "", (Series("train", points, 1),), **plot)])[0]


def labels(svg: str) -> list[str]:
    """The texts of a drawing: the numbers along its axes."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_ticks_are_round_and_large_steps_have_separators():
    (_, svg, _), _ = drawing((1.0, 0.0), (1_200_000.0, 1.0), span="wide").shapes
    assert {"0", "1,200,000", "0.00", "0.25", "1.00"} <= set(labels(svg))


def test_one_point_is_a_dot_and_no_point_is_no_plot():
    assert "<use " in drawing((1.0, 2.0)).shapes[0][1]
    assert draw([Plot("Loss", "", (Series("train", [(1.0, math.nan)], 1),))]) == []


def test_shares_that_are_all_zero_have_no_axis_below_zero():
    found = labels(drawing((2.0, 0.0), (4.0, 0.0), from_zero=True).shapes[0][1])
    assert found and all(label[0].isdigit() for label in found)
    below = labels(drawing((2.0, -1.0), (4.0, 0.0), from_zero=True).shapes[0][1])
    assert not all(label[0].isdigit() for label in below)


def test_one_spike_gives_a_logarithmic_axis():
    points = [(float(x), 1.0) for x in range(1, 50)] + [(50.0, 1000.0)]
    assert {"1", "10", "100", "1,000"} <= set(labels(drawing(*points).shapes[0][1]))
    assert "1,000" in labels(drawing(*points, marks=(Mark(7, "here"),)).shapes[0][1])


def test_a_plot_has_the_page_s_colors_and_words():
    """So that it is dark where the page is, and text of a job cannot become part of a picture."""
    mark = Mark(2.0, "$x_1$ resumed")
    found = drawing((1.0, 2.0), (3.0, 1.0), marks=(mark,))
    svg = found.shapes[0][1]
    assert "var(--c1)" in svg and not re.search(r"#0\d0\d0\d|#[0-9a-f]{6}\b", svg)
    assert found.keys == [("mark", "$x_1$ resumed")] and "resumed" not in svg


@pytest.mark.parametrize("span", ["wide", "half"])
def test_a_plot_has_a_second_drawing_for_phones(span):
    found = drawing((1.0, 2.0), (3.0, 1.0), span=span)
    assert [shown for shown, _, _ in found.shapes] == ["page", "phone"]


def test_on_paper_nothing_is_cut_and_nothing_is_to_be_dragged():
    css = render(evil_report(), train_rows(3))
    printed = css[css.index("@media print") :]
    assert "pre{max-height:none}" in printed
    assert ".tools,button{display:none}" in printed


def test_the_settings_of_matplotlib_s_user_change_nothing(monkeypatch):
    import matplotlib

    before = drawing((1.0, 2.0), (3.0, 1.0)).shapes
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30.0)
    assert drawing((1.0, 2.0), (3.0, 1.0)).shapes == before
    assert matplotlib.rcParams["font.size"] == 30.0


def test_matplotlib_is_imported_only_to_draw():
    names = "html", "build", "summary", "sweep_html"
    imports = "\n".join(f"import raytrain_adv.report.{name}" for name in names)
    script = f"{imports}\nimport sys\nassert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_proof_that_a_transform_ran_is_shown():
    proof = {
        "operator": "aten::_scaled_mm",
        "calls": 672,
        "modules": 224,
        "gpu_kernels": ["nvjet_qqtst_320x128"],
    }
    done = TransformReport(changed=224, skipped=1, proof=proof)
    page = render(RunReport(status="done", transforms={"fp8": done}), [])
    assert "aten::_scaled_mm ran 672 times in one training step, for 224 modules" in page
    assert "nvjet_qqtst_320x128" in page


def test_the_script_knows_which_axis_is_logarithmic():
    """Zoom and smoothing drew a loss that falls by four decades on a linear axis."""
    fell = [(step, 10.0 ** (1 - step / 25)) for step in range(1, 101)]
    flat = [(step, 2.0) for step in range(1, 101)]
    drawings = draw([Plot("a", "", (Series("a", points, 1),)) for points in (fell, flat)])
    assert ['"ylog":true' in drawing.data for drawing in drawings] == [True, False]
