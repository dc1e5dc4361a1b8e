import json
import re
from pathlib import Path

import pytest

from raytrain_adv import cli
from raytrain_adv.report import record
from raytrain_adv.report.compared import curves, differing_keys, distinct, read_runs, results
from raytrain_adv.report.record import RunReport


def make_run(folder: Path, rate: float, final: float) -> Path:
    folder.mkdir(parents=True)
    job = {"learning_rate": rate, "cutoff_len": 128, "output_dir": str(folder)}
    report = RunReport(
        status="done",
        job=job,
        steps=50,
        started_at=1000.0,
        finished_at=1083.0,
        eval_loss=((50, final),),
        train_loss=((50, 2.0),),
    )
    record.write(report, folder)
    rows = [{"kind": "train", "step": s, "loss": 3 - s / 50 + 0.1 * (s % 2)} for s in range(1, 51)]
    rows.append({"kind": "eval", "step": 50, "loss": final, "exact_answers": 0.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def runs(tmp_path):
    return [make_run(tmp_path / "a" / "x", 1e-3, 2.5), make_run(tmp_path / "b" / "x", 1e-4, 2.75)]


def test_runs_of_one_name_are_told_apart_by_their_folders(runs):
    assert distinct([Path("/a/x"), Path("/b/x")]) == ["a/x", "b/x"]
    assert distinct([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert distinct([Path("/a/x"), Path("/a/x/previous/1")]) == ["x", "x/previous/1"]
    assert len(set(distinct([Path("/a"), Path("/a")]))) == 2


def test_keys_and_results_that_differ_are_listed(runs):
    read = read_runs(runs)
    keys = {row[0]: row[1:] for row in differing_keys(read)}
    assert keys["learning_rate"] == ("0.001", "0.0001")
    assert "cutoff_len" not in keys
    assert list(keys) == ["learning_rate", "output_dir"], "keys that change nothing come last"
    assert ("eval loss", "2.5000", "2.7500") in results(read)
    assert ("time", "1:23", "1:23") in results(read)


def test_every_measure_has_a_line_for_each_run(runs):
    plots = {p.title: p for p in curves([(r.name, r.rows) for r in read_runs(runs)])}
    loss = plots["Training loss"].series
    assert [s.name for s in loss] == ["a/x, each row", "a/x", "b/x, each row", "b/x"]
    assert {s.color for s in loss} == {1, 2}
    assert [len(s.points) for s in plots["Exact answers"].series] == [1, 1], "0 is a value"


def test_the_page_reads_without_javascript_and_loads_nothing(runs, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert cli.main(["report", *map(str, runs), "--html", str(page)]) == 0
    said = capsys.readouterr().out
    assert "learning_rate" in said and "a/x" in said and f"wrote {page}" in said
    html = page.read_text()
    before_script = html[: html.index("<script>")]
    assert before_script.count("<svg") >= 3 and "0.0001" in before_script
    assert not re.search(r'(src|href)="(?!#)', html)


def test_one_run_gets_its_report_again(runs, capsys):
    assert cli.main(["report", str(runs[0])]) == 0
    assert (runs[0] / "report.html").exists()


def test_a_folder_without_a_run_is_an_error(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path), str(tmp_path)]) != 0
    assert "There is no report to read" in capsys.readouterr().err
