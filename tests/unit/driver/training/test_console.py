import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest

from raytrain_adv.driver.training import console
from raytrain_adv.driver.training.console import (
    Console,
    Progress,
    live_view,
    log_line,
    printable,
)
from raytrain_adv.report.parts import Sample
from raytrain_adv.report.record import RunReport
from raytrain_adv.report.summary import summary
from raytrain_adv.storage.metrics_file import FollowedFile, MetricsFile

ROW = {
    "kind": "train",
    "step": 120,
    "epoch": 0.84,
    "loss": 2.3412,
    "learning_rate": 1e-4,
    "grad_norm": 0.81,
    "step_s": 0.5,
    "tokens_per_second_per_worker": 12345.0,
    "mfu_bf16": None,
    "peak_memory_gib": 3.1,
    "data_wait_s": 0.02,
    "time": 1000.0,
}
EVAL = {
    "kind": "eval",
    "step": 120,
    "loss": 2.1,
    "perplexity": 8.17,
    "num_label_tokens": 9,
    "seconds": 3.2,
}

SCRIPT = """
import sys, time
from raytrain_adv.driver.training.console import Console
from raytrain_adv.storage.metrics_file import MetricsFile
folder, ending = sys.argv[1:]
file = MetricsFile(folder + "/metrics.jsonl", None)
with Console(folder, poll_s=0.02) as console:
    file.event("phase", "starting Ray")
    file.event("plan", "The run in numbers.", total_steps=200)
    for step in range(10, 210, 10):
        file.append({"kind": "train", "step": step, "loss": 400 / step, "step_s": 0.01})
        time.sleep(0.01)
    print("printed by someone else")
    if ending == "error":
        raise RuntimeError("worker died")
    if ending == "wait":
        print("READY", flush=True); time.sleep(600)
print("after the run")
"""


def in_terminal(tmp_path, ending, width=80, sends=None):
    """Run SCRIPT in a pseudo-terminal of the given width; return its exit code and output."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 30, width, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path), ending],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env={**os.environ, "TERM": "xterm-256color"},
        # Where the tests run in a shell's background, SIGINT is ignored, and would be here too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(follower)
    output = b""
    while True:
        try:
            data = os.read(leader, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not data:
            break
        output += data
        if sends is not None and b"READY" in output:
            process.send_signal(sends)
            sends = None
    os.close(leader)
    return process.wait(timeout=120), output.decode()


def cursor_is_shown(output):
    shown = [match == "h" for match in re.findall(r"\x1b\[\?25([hl])", output)]
    return not shown or shown[-1]


def plain(output):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output).replace("\r", "")


def wait_for(stream, text):
    """Wait until a stream shows a text."""
    end = time.monotonic() + 60
    while text not in stream.getvalue():
        assert time.monotonic() < end, stream.getvalue()
        time.sleep(0.01)


def logged(tmp_path, *, total_steps=None, rows=()):
    """Return what a Console writes into a log while the rows come."""
    stream = io.StringIO()
    file = MetricsFile(tmp_path / "metrics.jsonl", None)
    with Console(tmp_path, stream, poll_s=0.01):
        if total_steps is not None:
            file.event("plan", "The run in numbers.", total_steps=total_steps)
        for row in rows:
            file.append(row)
    return stream.getvalue()


def test_a_log_gets_one_line_per_row():
    progress = Progress(total_steps=600, step=110)
    line = log_line(progress.take(ROW), progress)
    assert line == (
        "step 120/600  epoch 0.84  loss 2.3412  lr 1.00e-04  grad  0.81   12,345 tok/s/worker  "
        "mfu -  mem 3.1 GiB  wait 0.4 %  eta 4:00"
    )


def test_an_evaluation_gets_its_line():
    progress = Progress(total_steps=600)
    expected = "eval 120/600  loss 2.1000  perplexity 8.17  9 label tokens  3.2 s"
    assert log_line(progress.take(EVAL), progress) == expected


def test_an_evaluation_has_what_compute_accuracy_and_each_dataset_add():
    """They were in metrics.jsonl alone, and the keys are to report them."""
    progress = Progress(total_steps=600)
    more = {"accuracy": 0.417, "exact_answers": 0.25, "num_answers": 16}
    each = {"loss/second": 2.0, "accuracy/second": 0.4, "loss/sg": 2.2}
    assert log_line(progress.take({**EVAL, **more, **each}), progress) == (
        "eval 120/600  loss 2.1000  perplexity 8.17  (second 2.0000, sg 2.2000)  "
        "41.7% of tokens right  25.0% of 16 answers exact  9 label tokens  3.2 s"
    )


def test_lines_of_a_log_are_aligned():
    progress = Progress(total_steps=1000)
    rows = [{**ROW, "step": step, "grad_norm": norm} for step, norm in ((1, 0.5), (999, 12.34))]
    lines = [log_line(progress.take(row), progress) for row in rows]
    assert lines[0].index("wait") == lines[1].index("wait")


def test_rows_that_came_last_are_shown_at_the_end(tmp_path):
    rows = [{**ROW, "step": step} for step in range(1, 30)]
    lines = logged(tmp_path, rows=rows).splitlines()
    assert [line.split()[1] for line in lines] == [str(step) for step in range(1, 30)]


def test_total_steps_may_come_through_an_event(tmp_path):
    plan = {"kind": "event", "event": "plan", "message": "numbers", "total_steps": 600}
    assert "step 120/600" in logged(tmp_path, rows=[plan, ROW])


def test_a_loss_that_is_not_finite_is_shown(tmp_path):
    assert "loss nan" in logged(tmp_path, rows=[{**ROW, "loss": float("nan")}])


def test_events_are_shown_with_the_time_since_the_start(tmp_path):
    event = {"kind": "event", "event": "phase", "message": "model"}
    assert logged(tmp_path, rows=[event]) == "[0:00] model\n"


def test_rows_of_before_are_not_shown_again(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl", None) as file:
        file.append({**ROW, "step": 1})
    stream = io.StringIO()
    console = Console(tmp_path, stream, poll_s=0.01)
    with console, MetricsFile(tmp_path / "metrics.jsonl", 1) as file:
        file.append({**ROW, "step": 2})
    assert re.findall(r"^step (\d+)", stream.getvalue(), re.M) == ["2"]


def test_steps_that_a_restart_computes_again_are_shown_again(tmp_path):
    stream = io.StringIO()
    path = tmp_path / "metrics.jsonl"
    with Console(tmp_path, stream, poll_s=0.01):
        with MetricsFile(path, None) as file:
            for step in (1, 2, 3):
                file.append({**ROW, "step": step})
        wait_for(stream, "step 3")
        with MetricsFile(path, 1) as file:
            for step in (2, 3, 4):
                file.append({**ROW, "step": step, "loss": 1.0})
    steps = re.findall(r"^(?:step (\d)|\[.*(Resumed))", stream.getvalue(), re.M)
    assert ["".join(found) for found in steps] == ["1", "2", "3", "Resumed", "2", "3", "4"]


def test_a_half_written_line_waits_for_its_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    followed = FollowedFile(path)
    assert followed.new_rows() == []
    line = json.dumps(ROW)
    path.write_text(line[:20])
    assert followed.new_rows() == []
    path.write_text(line + "\n")
    assert followed.new_rows() == [ROW]
    assert followed.new_rows() == []


def test_a_row_of_another_version_does_not_stop_the_run(tmp_path):
    stream = io.StringIO()
    file = MetricsFile(tmp_path / "metrics.jsonl", None)
    with Console(tmp_path, stream, poll_s=0.01) as console:
        file.append({"kind": "train", "loss": "no step here"})
        wait_for(stream, "The live view stopped")
        console.say("still talking")
    assert "The live view stopped (KeyError: 'step'); the run continues" in stream.getvalue()
    assert "still talking" in stream.getvalue()


def test_a_closed_pipe_does_not_stop_the_run(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    with Console(tmp_path, stream, poll_s=0.01) as console:
        console.say("nobody reads this")
        console.say("nor this")
    with pytest.raises(BrokenPipeError):
        stream.close()


def test_an_error_of_the_run_passes_through(tmp_path):
    with pytest.raises(RuntimeError, match="died"), Console(tmp_path, io.StringIO()):
        raise RuntimeError("worker died")
    assert "live view" not in [thread.name for thread in threading.enumerate()]


def test_control_characters_do_not_reach_the_terminal():
    assert "\x1b" not in printable("\x1b[31mred\r", "utf-8")
    assert printable("Zürich →", "ascii") == "Z\\xfcrich \\u2192"


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_live_view_fits_the_terminal(width):
    from rich.console import Console as Terminal

    progress = Progress(total_steps=6000)
    for step in range(1000, 6000, 400):
        progress.take({**ROW, "step": step, "time": float(step), "mfu_bf16": 0.416})
    progress.take({**EVAL, "step": 6000})
    terminal = Terminal(file=io.StringIO(), width=width, force_terminal=False)
    terminal.print(live_view(progress, width, 30))
    lines = terminal.file.getvalue().splitlines()
    assert len(lines) == 10
    assert max(map(len, lines)) <= width
    assert "…" not in terminal.file.getvalue()
    heads = lines[0].split()
    assert {"step", "loss", "tok/s"} <= set(heads)
    assert ("wait" in heads) == (width >= 80)


class Recorder(io.StringIO):
    """A terminal that records what is drawn on it."""

    def isatty(self):
        return True


@pytest.mark.parametrize("num_rows", [60, 0])
def test_a_terminal_is_redrawn_at_most_once_a_second(tmp_path, monkeypatch, num_rows):
    """Seven redraws a second made 2 MB of a recorded run of 300 steps."""
    monkeypatch.setenv("TERM", "xterm")
    terminal, began = Recorder(), time.monotonic()
    file = MetricsFile(tmp_path / "metrics.jsonl", None)
    with Console(tmp_path, terminal, poll_s=0.01):
        for step in range(num_rows):
            file.append({**ROW, "step": step + 1})
            time.sleep(0.02)
        time.sleep(max(began + 1.5 - time.monotonic(), 0.0))
        wait_for(terminal, "passed" if num_rows else "starting  ")
        drawn = re.findall(r"passed|starting  ", terminal.getvalue())
        assert len(drawn) <= time.monotonic() - began + 1  # the first at once


def test_a_terminal_is_not_redrawn_while_nothing_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("raytrain_adv.driver.training.console.REDRAW_S", 0.0)
    monkeypatch.setattr("raytrain_adv.driver.training.console.time.time", lambda: 1000.0)
    looks, view = [], console.live_view
    monkeypatch.setattr(console, "live_view", lambda *given: looks.append(given) or view(*given))
    terminal, end = Recorder(), time.monotonic() + 60
    with Console(tmp_path, terminal, poll_s=0.01):
        while len(looks) < 5 and time.monotonic() < end:
            time.sleep(0.01)
        during = terminal.getvalue()
    assert len(looks) >= 5
    assert during.count("starting  0:00") == 1


def test_a_terminal_shows_table_bar_and_last_rows(tmp_path):
    code, output = in_terminal(tmp_path, "done")
    assert code == 0
    last = plain(output)[-1200:]
    assert "200/200" in last
    assert "100%" in last
    assert last.index("100%") < last.index("after the run")
    assert "printed by someone else" in plain(output)
    assert cursor_is_shown(output)


def test_an_error_leaves_the_terminal_in_order(tmp_path):
    code, output = in_terminal(tmp_path, "error")
    assert code == 1
    assert plain(output).rstrip().endswith("RuntimeError: worker died")
    assert "200/200" in plain(output)
    assert cursor_is_shown(output)


def test_ctrl_c_leaves_the_terminal_in_order(tmp_path):
    code, output = in_terminal(tmp_path, "wait", sends=signal.SIGINT)
    assert code != 0
    assert plain(output).rstrip().endswith("KeyboardInterrupt")
    assert cursor_is_shown(output)


def test_even_a_killed_run_leaves_the_cursor(tmp_path):
    code, output = in_terminal(tmp_path, "wait", sends=signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert cursor_is_shown(output)


def test_summary_shows_what_was_reached_and_where_it_is():
    report = RunReport(
        status="done",
        job={"output_dir": "saves/x"},
        steps=600,
        world_size=2,
        device="CPU",
        train_loss=[(10, 5.0), (600, 2.5)],
        samples=[Sample(prompt="What?", answer="That.\n\nAnd more.", reference="This.")],
        timeline={"data": 1.5, "training": 130.0},
        model_dir="saves/x/model",
    )
    text = summary(report)
    for words in ("That.", "This.", "2.5000 (step 600)", "2 workers", "training 2:10 min"):
        assert words in text
    assert text.index("saves/x/model") < text.index("saves/x/report.html")


def test_summary_of_an_empty_run_has_no_gaps():
    assert "\n\n\n" not in summary(RunReport(status="failed", error="x"))
