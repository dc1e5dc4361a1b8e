"""The starts of a run's workers, from rows as metrics.jsonl has them."""

import subprocess
import sys

from raytrain_adv.report.build import starts
from raytrain_adv.report.html import render
from raytrain_adv.report.record import RunReport
from raytrain_adv.report.summary import story, summary


def rows_of(*found: tuple[int, int, str, str]) -> list[dict[str, object]]:
    """Rows of starts, each (step, workers, nodes, lost)."""
    rows: list[dict[str, object]] = []
    for time, (step, workers, nodes, lost) in enumerate(found):
        places = {"nodes": nodes, "lost": lost}
        rows.append({"kind": "event", "event": "workers", "time": time, **places})
        plan = {"world_size": workers, "resumed_from_step": step or None}
        rows.append({"kind": "event", "event": "plan", "time": time, **plan})
        rows.append({"kind": "train", "time": time, "step": step + 1, "loss": 1.0})
    return rows


def test_every_change_of_the_number_of_workers_is_reported_with_step_and_time():
    found = starts(
        rows_of((0, 2, "a b", ""), (40, 1, "a", "b"), (50, 1, "a", ""), (1080, 2, "a b", ""))
    )
    assert [(s.step, s.time, s.workers) for s in found] == [
        (0, 0, 2),
        (40, 1, 1),
        (50, 2, 1),
        (1080, 3, 2),
    ]
    assert found[1].nodes == ("a",) and found[1].lost == ("b",)
    assert story(found) == "2 workers, 1 from step 40, 2 from step 1,080"
    report = RunReport(status="done", world_size=2, starts=found)
    assert "2 workers, 1 from step 40, 2 from step 1,080" in summary(report)
    page = render(report, [])
    assert "<td>a</td>" in page and "<td>b</td>" in page


def test_a_run_that_started_once_does_not_list_its_starts():
    found = starts(rows_of((0, 2, "a b", "")))
    assert story(found) == ""
    assert "Starts of the workers" not in render(RunReport(status="done", starts=found), [])


def test_a_start_that_ended_before_it_knew_its_step_is_no_start():
    rows = rows_of((0, 2, "a b", ""))
    rows.insert(0, {"kind": "event", "event": "workers", "nodes": "c d", "lost": ""})
    assert [one.nodes for one in starts(rows)] == [("a", "b")]


def test_the_command_is_in_the_words_that_start_it_again(tmp_path):
    said = "from raytrain_adv.report.build import command_line; print(command_line())"
    (tmp_path / "words.py").write_text(said)
    run = [sys.executable, "-m", "words", "job.yaml", "run_name=two words"]
    found = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert found == "python -m words job.yaml 'run_name=two words'\n"
    run[1:3] = [str(tmp_path / "words.py")]
    found = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert found == "words.py job.yaml 'run_name=two words'\n"
